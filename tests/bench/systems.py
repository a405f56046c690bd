"""What is compared: a host's residents, a plain PEFT loop, and the frozen base alone.

(a) N residents and (b) one are both `Residents`; (c) is `PeftLoop`, (d) is `BaseAlone`. On several ranks all
of them are partitioned by DeepSpeed ZeRO-3 with the same settings. (c) and (d) hold a model of their own,
without any of the host's wrappers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers import head
from workers.adapter import Adapter
from workers.data import encode_all
from workers.factor_file import PREFIX
from workers.host import Host
from workers.order import batch_samples
from workers.ranks import Ranks
from workers.rows import Row
from workers.types import Attach, BaseSpec, Event, JobSpec, JobStopped, StepDone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Factors = dict[str, tuple[Tensor, Tensor]]


class Residents:
    """A host with `jobs` resident."""

    def __init__(self, base: BaseSpec, jobs: Sequence[JobSpec], ranks: Ranks) -> None:
        self.host = Host.load(base, ranks)
        for job in jobs:
            self.attach(job)

    def attach(self, job: JobSpec) -> list[Event]:
        """Returns when the job is resident, with what was told."""
        events = self.host.apply(Attach(job))
        while self.host.joining:
            events += self.host.take_in(60.0)
        refuse_stopped(events)
        return events

    def steps(self, count: int) -> None:
        """Ticks until the residents have done `count` steps, all of them together."""
        while count > 0:
            events = self.host.tick()
            refuse_stopped(events)
            count -= sum(isinstance(event, StepDone) for event in events)

    def train(self) -> list[Event]:
        """Ticks until nobody is resident."""
        events: list[Event] = []
        while self.host.busy:
            events += self.host.tick()
        refuse_stopped(events)
        return events


def refuse_stopped(events: Sequence[Event]) -> None:
    """Raises RuntimeError if a job was stopped: what is measured must be training."""
    stopped = [event for event in events if isinstance(event, JobStopped)]
    if stopped:
        raise RuntimeError(f"{stopped[0].job} was stopped: {stopped[0].message}")


class PeftLoop:
    """One job in the loop that people write: PEFT's model, padded batches, `torch.optim.AdamW`.

    On several ranks the loop that people write with DeepSpeed: ZeRO-3, its engine's backward and step.
    """

    def __init__(self, base: BaseSpec, job: JobSpec, ranks: Ranks, first: Adapter | None = None) -> None:
        self.training, self.ranks, self.step_done = job.training, ranks, 0
        self._keep_alive, model = plain_model(base, ranks)
        spec = job.adapter
        config = LoraConfig(
            r=spec.r, lora_alpha=int(spec.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(model, config)
        if first is not None:
            _set_factors(self.model, first)
        self.model.train()
        self.device = device()
        if not partitioned(base, ranks):
            self.model.to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        self.rows = encode_all(tokenizer, job.train, self.training.sequence_len)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.trainable, lr=self.training.learning_rate, weight_decay=self.training.weight_decay
        )
        self.engine = self._partitioned(base) if partitioned(base, ranks) else None

    def _partitioned(self, base: BaseSpec) -> Any:
        import deepspeed

        config = {
            **deepspeed_config(base),
            "gradient_clipping": self.training.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(
            model=self.model, model_parameters=self.trainable, optimizer=self.adamw, config=config
        )
        return engine

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> float:
        """One step; the loss, this rank's part of it."""
        training = self.training
        samples = batch_samples(training.seed, self.step_done, len(self.rows), training.global_batch_size)
        batch = [self.rows[sample] for sample in samples]
        targets = sum(label != -100 for row in batch for label in row.labels[1:])
        loss = self._loss(batch[self.ranks.rank :: self.ranks.world_size]) / targets
        if self.engine is not None:
            # DeepSpeed averages gradients over ranks; the batch's loss is their sum.
            self.engine.backward(loss * self.ranks.world_size)
            self.engine.step()
        else:
            loss.backward()
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.trainable, training.max_grad_norm)
            self.adamw.step()
            self.adamw.zero_grad()
        self.step_done += 1
        return float(loss.detach())

    def _loss(self, rows: Sequence[Row]) -> Tensor:
        input_ids, labels = padded(rows, self.device)
        logits = (self.engine or self.model)(input_ids=input_ids).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    def factors(self) -> Factors:
        """Module name -> (A, B), gathered from all ranks."""
        held = dict(self.model.named_parameters())
        names = [name for name in held if name.endswith("lora_A.default.weight")]
        with _whole(self.trainable, self.engine is not None):
            values = {name: p.detach().cpu().clone() for name, p in held.items() if p.requires_grad}
        return {
            name.removeprefix(PREFIX).removesuffix(".lora_A.default.weight"): (
                values[name],
                values[name.replace("lora_A", "lora_B")],
            )
            for name in names
        }


class BaseAlone:
    """The limit: the frozen base, forward and backward to its input, on tokens like the jobs'.

    The loss is taken at as many positions as the jobs learn, so the head costs what it costs the host.
    """

    def __init__(self, base: BaseSpec, rows: Sequence[Row], ranks: Ranks) -> None:
        self._keep_alive, self.model = plain_model(base, ranks)
        head.install(self.model)
        self.model.get_input_embeddings().register_forward_hook(_ask_for_gradient)
        if partitioned(base, ranks):
            import deepspeed

            self.engine, *_ = deepspeed.initialize(model=self.model, config=deepspeed_config(base))
        else:
            self.model.to(device())
        self.input_ids, labels = padded(rows, device())
        learned = labels[:, 1:].flatten() != -100
        width = labels.shape[1]
        at = torch.arange(labels.numel(), device=labels.device).view(-1, width)[:, :-1].flatten()
        self.positions, self.labels = at[learned], labels[:, 1:].flatten()[learned]

    def passes(self, count: int) -> None:
        for _ in range(count):
            logits = head.target_logits(self.model, self.positions, input_ids=self.input_ids)
            F.cross_entropy(logits.float(), self.labels).backward()


def _ask_for_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


# ---- models and batches -----------------------------------------------------------------------------------


def partitioned(base: BaseSpec, ranks: Ranks) -> bool:
    return base.zero == "3" or (base.zero == "auto" and ranks.world_size > 1)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_model(base: BaseSpec, ranks: Ranks) -> tuple[Any, Any]:
    """The frozen model as Hugging Face gives it; under ZeRO-3 with what must be kept alive beside it."""
    keep_alive = None
    if partitioned(base, ranks):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False
        )
        keep_alive = HfDeepSpeedConfig(deepspeed_config(base))
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=DTYPES[base.dtype], attn_implementation=base.attention
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    return keep_alive, model.eval()


def deepspeed_config(base: BaseSpec) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": base.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **base.deepspeed},
    }


def padded(rows: Sequence[Row], where: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, longest]."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = [[*row.input_ids, *[0] * (length - len(row.input_ids))] for row in rows]
    labels = [[*row.labels, *[-100] * (length - len(row.labels))] for row in rows]
    return torch.tensor(input_ids, device=where), torch.tensor(labels, device=where)


def _set_factors(model: nn.Module, first: Adapter) -> None:
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in first.factors.items():
            held[f"{PREFIX}{name}.lora_A.default.weight"].copy_(a)
            held[f"{PREFIX}{name}.lora_B.default.weight"].copy_(b)


def _whole(parameters: Sequence[nn.Parameter], split: bool) -> Any:
    """Within the block every rank has these parameters whole."""
    from contextlib import nullcontext

    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
