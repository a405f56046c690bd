"""Everything that crosses the process boundary between orchestrator and workers.

Frozen dataclasses over the standard library only: both sides import this file, neither imports the other.
Commands go to a host and take effect between two ticks on all ranks; events come back in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TaskType = Literal["chat", "classification", "recommendation"]
TASK_TYPES: tuple[TaskType, ...] = ("chat", "classification", "recommendation")

StopCode = Literal[
    "diverged",
    "bad_data",
    "out_of_memory",
    "waits_for_memory",
    "disk_full",
    "checkpoints_away",
    "internal_error",
]
"""Why a host stops a job by itself. `orchestrator.job.REASONS` maps each to a status and to words."""


class BadInput(ValueError):
    """Something a user wrote is wrong. The message is one sentence: file, key or row, and what to do."""


class CheckpointsAway(OSError):
    """The object store of the checkpoints does not do what it is asked. It may, later: nothing is lost."""


class Superseded(Exception):
    """Another controller has taken over from the one that speaks: it must stop, and touch nothing more."""

    def __init__(self, newest: int, ours: int) -> None:
        """Their epochs, which the store gives out."""
        super().__init__(newest, ours)

    def __str__(self) -> str:
        newest, ours = self.args
        return (
            f"another controller ({newest}) has taken over from this one ({ours}); jobs and hosts are its own"
        )


# ---- what a host loads and a job asks for -----------------------------------------------------------


@dataclass(frozen=True)
class BaseSpec:
    """A frozen base and how a host holds it. `path` is a local folder in Hugging Face layout."""

    path: str
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    zero: Literal["auto", "none", "3"] = "auto"
    deepspeed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Passed through to DeepSpeed's `zero_optimization` block."""
    load_in_4bit: bool = False
    """NF4 by bitsandbytes; on a GPU and with `zero` none."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """varlen: training rows lie end to end, without padding (`workers.varlen`)."""
    activation_checkpointing: bool = False
    arithmetic: Literal["auto", "exact", "fused"] = "auto"
    """Of the adapters: exact rounds as PEFT does, bit for bit; fused is faster. auto: exact on a CPU."""
    slots: int = 8
    tokens_per_tick: int | Literal["auto"] = 4096
    """Padded tokens one rank may hold in one micro-batch, and spend in one tick; `auto` measures it."""
    chunk_tokens: int | None = None
    """Padded tokens one chunk of a job's step may hold on a rank; None: `tokens_per_tick`, 4096 with `auto`.

    Sums are taken chunk by chunk, so it bears on a result's last bits: never a measured number."""
    name: str = ""
    """What `base_model_name_or_path` says in the adapters trained on it."""
    digest: str = ""
    """Of the weights, tokenizer and chat template; kept with every checkpoint and adapter."""


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA hyper-parameters under PEFT's names (LoRA arXiv 2106.09685; rsLoRA arXiv 2312.03732)."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """One split of one data set. `path` is absolute: a .jsonl file, or a folder holding `<split>.jsonl`."""

    path: str
    type: TaskType
    split: str = "train"
    labels: tuple[str, ...] = ()
    """Label words, classification only."""
    instruction: str = ""
    """System message put before every row; empty for none."""
    max_samples: int | None = None
    """The first so many rows; None for all."""


@dataclass(frozen=True)
class TrainingSpec:
    """One job's own optimisation. Exactly one of `num_epochs` and `max_steps` is set."""

    learning_rate: float
    global_batch_size: int
    sequence_len: int
    num_epochs: float | None = None
    max_steps: int | None = None
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    evals_per_epoch: int = 1
    saves_per_epoch: int = 1
    max_bad_steps: int = 3
    """Consecutive steps with a non-finite gradient after which the job is stopped."""
    seed: int = 0


@dataclass(frozen=True)
class Teacher:
    """A frozen adapter, and the rows that it teaches a student: every step takes `batch_size` of them."""

    adapter_dir: str
    train: tuple[DatasetSpec, ...]
    validation: tuple[DatasetSpec, ...]
    batch_size: int
    weight: float = 1.0
    """Of its rows' mean loss, relative to the other teachers' weights."""


@dataclass(frozen=True)
class DistillSpec:
    """Train one adapter against others on the same base (Hinton et al., arXiv 1503.02531 section 2).

    At a target with teacher p and student q, softened by `temperature` T, and label y:
    labels * CE(q_1, y) + (1 - labels) * T^2 * KL(p_T || q_T).
    """

    teachers: tuple[Teacher, ...]
    temperature: float = 1.0
    labels: float = 0.5
    """From 0 to 1. 1: the labels alone, no teacher is read; that is training on all the rows jointly."""
    start: str = ""
    """Adapter folder the student starts from; empty for a fresh one. Its rank is `AdapterSpec.r` at most."""


@dataclass(frozen=True)
class JobSpec:
    """What a host needs to train one attempt of one job."""

    job: str
    attempt: int
    adapter: AdapterSpec
    training: TrainingSpec
    train: tuple[DatasetSpec, ...]
    validation: tuple[DatasetSpec, ...]
    checkpoint_dir: str
    """Holds `step-<n>` folders; the newest one that verifies is resumed from."""
    weight: int = 50
    """Share of a tick's tokens, relative to the other residents' weights."""
    distill: DistillSpec | None = None
    """Then the rows are its teachers', and `train` and `validation` are empty."""
    gram_rows: int = 0
    """Training rows from which `gram.safetensors` is made beside the finished adapter; 0 for none."""
    checkpoint_url: str = ""
    """Where an object store keeps the same (any URL of fsspec's); empty for the folder alone."""


@dataclass(frozen=True)
class EvaluationSpec:
    """How one adapter is scored on one task's rows."""

    datasets: tuple[DatasetSpec, ...]
    sequence_len: int
    max_new_tokens: int = 48
    """Chat only: longest generated reply."""
    generate_samples: int = 32
    """Chat only: how many replies are generated for ROUGE-L and chrF."""


@dataclass(frozen=True)
class RuleOptions:
    """What a plan may set beside rule, rank and weights; None is the rule's default. See `workers.rules`."""

    energy: float | None = None
    """Cut every module to the lowest rank that keeps this share of sum_i s_i^2."""
    bucket: int | None = None
    """Cut to a rank that vLLM sets memory aside for."""
    density: float | None = None
    """Share of entries that are kept; 0.5."""
    seed: int | None = None
    """Of the entries that are dropped at random; 0."""
    epsilon: float | None = None
    """della: how far the chance to be kept rises from the smallest entry to the largest; 0.1."""
    gamma: float | None = None
    """breadcrumbs: share of entries that are dropped as too large; 0.01."""
    common: float | None = None
    """iso_cts: share of the directions taken from the sum; 0.8."""
    alpha: float | None = None
    """regmean: what the off-diagonal of a Gram matrix is multiplied by; 0.9."""
    scale: float | None = None
    """Of the result; 1."""


@dataclass(frozen=True)
class FuseTask:
    """Fuse adapter folders into `out_dir` (PEFT layout, with `fusion.json`). See `workers.fuse`."""

    adapter_dirs: tuple[str, ...]
    weights: tuple[float, ...]
    rule: str
    rank: int | None
    """What the result is cut to; None for rules that decide it themselves."""
    out_dir: str
    groups: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(part of a module's name, a weight an adapter): where the first one occurs, it takes the place of
    `weights`. Empty: `weights` hold for every module."""
    options: RuleOptions = RuleOptions()


@dataclass(frozen=True)
class SearchTask:
    """One task that a search judges its fusions on; task i is what adapter i of the plan was trained for."""

    task: str
    metric: str
    lower_is_better: bool
    evaluation: EvaluationSpec
    """Validation rows: the test rows are for what comes out."""
    floor: float = 0.0
    """Share of the parent's score that must be kept."""


@dataclass(frozen=True)
class SearchSpec:
    """Find weights for a fusion plan, by trials on the resident base, and make the best one's adapter."""

    plan: FuseTask
    """Its weights are those of the first trial."""
    tasks: tuple[SearchTask, ...]
    trials: int
    trials_dir: str
    """Keeps the table of trials, from which a search goes on."""
    groups: tuple[str, ...] = ()
    """Parts of module names that get weights of their own; empty for one weight an adapter."""
    seed: int = 0


# ---- commands: orchestrator -> host -----------------------------------------------------------------


@dataclass(frozen=True)
class Attach:
    job: JobSpec


@dataclass(frozen=True)
class Detach:
    """Take a job off the host after saving it: cancelled, preempted, or done."""

    job: str
    attempt: int


@dataclass(frozen=True)
class Evaluate:
    """Score an adapter folder (None: the base alone) on the resident base."""

    request: str
    adapter_dir: str | None
    evaluation: EvaluationSpec


@dataclass(frozen=True)
class SearchWeights:
    """Search on the resident base, a trial between two ticks; ends with SearchDone or EvaluationFailed."""

    request: str
    search: SearchSpec


@dataclass(frozen=True)
class Close:
    pass


Command = Attach | Detach | Evaluate | SearchWeights | Close


# ---- events: host -> orchestrator -------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes of a rank = fixed + per parameter * all slots' parameters + per token * tokens of a pass."""

    limit_bytes: int
    """What the fullest rank may hold."""
    fixed_bytes: int
    bytes_per_token: float
    bytes_per_parameter: int
    """Of an adapter: weight, gradient and AdamW's two moments."""


@dataclass(frozen=True)
class HostMeasured:
    """What a host has found out about itself on its ticks; the latest one holds."""

    tokens_per_tick: int
    calibrating: bool
    """True while the budget is still being looked for."""
    tokens_per_pass: int
    memory: MemoryModel
    adapter_parameters: int
    """Room for adapters, all slots together, those that are taken included."""
    half_speed_tokens: int | None = None
    """Padded tokens of a rank's tick at half of its best speed; None unless the budget was looked for and
    found."""


@dataclass(frozen=True)
class HostReady:
    world_size: int
    zero: Literal["none", "3"]
    slots: int
    base_parameters: int
    load_seconds: float


@dataclass(frozen=True)
class Attached:
    job: str
    attempt: int
    step: int
    """Steps already done: 0 for a fresh job, the checkpoint's step for a resumed one."""
    num_steps: int
    train_rows: int
    trainable_parameters: int


@dataclass(frozen=True)
class StepDone:
    job: str
    attempt: int
    step: int
    """1 for the first step."""
    loss: float
    """Mean over the batch's target tokens."""
    grad_norm: float
    learning_rate: float
    tokens: int
    """Real (unpadded) tokens of the batch, prompt included; what a teacher reads too counts twice."""
    seconds: float
    skipped: bool = False
    """True when the gradient was not finite and the step was left out."""
    padded_tokens: int = 0
    """What `tokens` took with padding."""


@dataclass(frozen=True)
class Validated:
    job: str
    attempt: int
    step: int
    loss: float


@dataclass(frozen=True)
class CheckpointSaved:
    job: str
    attempt: int
    step: int
    path: str


@dataclass(frozen=True)
class OutOfMemory:
    """A pass did not fit. Its jobs begin their current step again, in smaller passes; no step is lost."""

    job: str
    """Whose chunk was the largest of the pass."""
    attempt: int
    step: int
    """Steps that job has done."""
    tokens: int
    """Padded tokens of the pass on a rank."""
    most_tokens: int
    """Most from now on: of a pass, or of this job's chunks if the pass was a single chunk."""


@dataclass(frozen=True)
class TrainingFinished:
    """All steps done and saved; `adapter_dir` is in PEFT layout. The job has left its slot."""

    job: str
    attempt: int
    step: int
    adapter_dir: str


@dataclass(frozen=True)
class Detached:
    job: str
    attempt: int
    step: int


@dataclass(frozen=True)
class JobStopped:
    """The host stopped the job by itself. Its last good checkpoint stays."""

    job: str
    attempt: int
    step: int
    code: StopCode
    message: str


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of one adapter on one task."""

    task_type: TaskType
    metrics: Mapping[str, float]
    rows: int
    predictions: tuple[Mapping[str, Any], ...]
    """One mapping a row, JSON values only; classification and recommendation carry every row."""
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Classification: rows are truth, columns are prediction, both in the order of `labels`."""
    row_scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    """What the metrics are made of, one figure a row, in the order of the rows; two adapters pair by it.

    `nll` (nats) and `tokens` of the target; chat: `correct` tokens, and `rouge_l` of the rows replied to;
    classification: `truth` and `predicted` as places in `labels`; recommendation: its metrics of each row."""


@dataclass(frozen=True)
class EvaluationDone:
    request: str
    report: EvaluationReport
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far something is that is done one by one: modules, shards, trials."""

    done: int
    total: int


@dataclass(frozen=True)
class SearchAdvanced:
    """A trial more."""

    request: str
    trials: Progress


@dataclass(frozen=True)
class SearchDone:
    """The best trial's adapter is in the plan's `out_dir`."""

    request: str
    report: Mapping[str, Any]
    """The fusion's report; `search` has the table of trials."""


@dataclass(frozen=True)
class EvaluationFailed:
    request: str
    message: str


@dataclass(frozen=True)
class HostFailed:
    """The host is gone; every resident goes back to the queue with its last checkpoint."""

    message: str


JobEvent = (
    Attached | StepDone | Validated | CheckpointSaved | OutOfMemory | TrainingFinished | Detached | JobStopped
)
Event = (
    HostReady
    | HostMeasured
    | JobEvent
    | EvaluationDone
    | SearchAdvanced
    | SearchDone
    | EvaluationFailed
    | HostFailed
)


@dataclass(frozen=True)
class Roll:
    """A host as whoever takes it over is to see it: as it was after event number `after`.

    What was asked of it and not answered by then. The events that follow are still to be polled.
    """

    after: int
    ready: HostReady | None = None
    measured: HostMeasured | None = None
    attached: tuple[JobSpec, ...] = ()
    """Jobs that were sent to train, and of which none has finished, stopped or been detached."""
    requests: tuple[Evaluate | SearchWeights, ...] = ()


# ---- CPU tasks that need no base in memory: run anywhere, pure files in, files out --------------------


@dataclass(frozen=True)
class ExportTask:
    """Write a release folder: the adapter alone, or merged into a full model."""

    adapter_dir: str
    base_path: str
    merged: bool
    out_dir: str
    extra_files: tuple[tuple[str, str], ...] = ()
    """(name, text): the card, the recipe, and what else is put into the folder as it is."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the merged weights. Give `BaseSpec.dtype`: then the merged model computes what the host computed."""
    name: str = ""
    """`name/version` of what is released."""
    base_digest: str = ""
    """If the base's files have just been verified: then they are not read once more to name them."""
    base_weights: str = ""
    """Of a merged release: what the base's config and weights must hash to, checked as they are read."""
    repair: bool = False
    """Write the adapter as every server reads it: one rank, scale 1 (`workers.servers.repaired`)."""
    signing_key: str | None = None
    """Private key in PEM with which the folder is signed."""


Task = FuseTask | ExportTask
