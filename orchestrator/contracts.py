"""The orchestrator's two boundaries: `Cluster` (Ray, or in-process) and `Registry` (MLflow, or in memory).

Protocols and the frozen values they speak in; no implementation, no third party.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator.disk import is_full
from workers.types import (
    BadInput,
    BaseSpec,
    Command,
    EvaluationReport,
    EvaluationSpec,
    Event,
    Progress,
    Roll,
    Task,
)

# ---- cluster ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """What the cluster could give to new hosts and CPU tasks."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class TaskResult:
    """End of a CPU task: `value` on success, else `error` in one sentence.

    `refused` tells a wrong input (the user's) from a failure of ours; `disk_full` may pass by itself.
    """

    value: Any = None
    error: str | None = None
    refused: bool = False
    disk_full: bool = False

    @classmethod
    def of(cls, error: BaseException) -> TaskResult:
        """What a task that raised came to."""
        if isinstance(error, BadInput):
            return cls(error=str(error), refused=True)
        first = next(iter(str(error).strip().splitlines()), "no message")
        return cls(error=f"{type(error).__name__}: {first}", disk_full=is_full(error))


@dataclass(frozen=True)
class LivingHost:
    """A host that outlived the controller that started it."""

    name: str
    base: BaseSpec
    world_size: int
    on_gpus: bool
    roll: Roll
    """What it was asked, and had not answered, as far as anybody has taken in."""


class ClusterUnreachable(Exception):
    """The cluster does not answer or cannot be started."""


class Cluster(Protocol):
    """Processes and resources. Calls return at once; outcomes arrive by `poll` and `task_result`."""

    def adopt(self, epoch: int) -> Sequence[LivingHost]:
        """Take over this home's hosts that live on, as controller number `epoch`, which must be its highest.

        From then on they refuse whoever has a lower number, and the events that nobody has taken in come by
        `poll`: some of them may have been acted upon already. Ask once, before anything else.
        """
        ...

    def capacity(self) -> Capacity: ...

    def start_host(self, host: str, base: BaseSpec, world_size: int) -> None:
        """Reserve one bundle per rank, all or none, and load the base; HostReady or HostFailed follows."""
        ...

    def send(self, host: str, command: Command) -> None:
        """Put a command in the host's mailbox: it takes effect between two ticks, on all ranks."""
        ...

    def poll(self, host: str) -> Sequence[Event]:
        """Events since the last poll, in order, each exactly once. A dead host yields HostFailed.

        A poll says that the events before it were taken in. Raises Superseded when another controller has
        taken over: this one must stop, and its hosts are no longer its own.
        """
        ...

    def stop_host(self, host: str) -> None:
        """Close the host and give its resources back; does nothing if it is gone."""
        ...

    def submit_task(self, task_id: str, task: Task) -> None:
        """Run a CPU task once; asking again for the same id while it runs does nothing."""
        ...

    def task_result(self, task_id: str) -> TaskResult | None:
        """None while it runs."""
        ...

    def task_progress(self, task_id: str) -> Progress | None:
        """How far a task was when it last told; None for one that has told nothing."""
        ...

    def forget_task(self, task_id: str) -> None:
        """The result of a task was taken in: nothing is kept of it."""
        ...

    def close(self) -> None: ...


# ---- registry -----------------------------------------------------------------------------------------


class RegistryUnreachable(Exception):
    """The registry's server does not answer: the work waits and is tried again."""


class RegistryConflict(Exception):
    """An alias is not where the caller believed (compare-and-swap failed), or a version was altered."""


class NoSuchVersion(LookupError):
    """No registered version under that name and number or alias."""


@dataclass(frozen=True)
class MetricPoint:
    key: str
    value: float
    step: int
    timestamp_ms: int


@dataclass(frozen=True)
class Scores:
    """One task's evaluation as the registry keeps it."""

    task: str
    """The recipe's `task`, e.g. `finance-sentiment`."""
    dataset: str
    dataset_digest: str
    """SHA-256 over the evaluation rows' files."""
    report: EvaluationReport


@dataclass(frozen=True)
class NewVersion:
    """All of an adapter version, so that it is registered whole or not at all."""

    step_id: str
    """Content id of the register step; registering twice under one id returns the first version."""
    name: str
    """Registered name, `<base-slug>.<task>`."""
    run_id: str
    adapter_dir: Path
    """PEFT files, verified against their manifest before upload."""
    model_type: Literal["lora-adapter", "lora-adapter-fused"]
    tags: Mapping[str, str]
    params: Mapping[str, str]
    scores: Sequence[Scores]
    base_scores: Sequence[Scores]
    recipe_yaml: str
    card: str
    """The README.md of the version."""
    parents: Sequence[str] = ()
    """`name/version` of fused parents."""
    fusion_report: Mapping[str, Any] | None = None
    controls: Mapping[str, Sequence[Scores]] = field(default_factory=dict[str, Sequence[Scores]])
    """What a fused version is compared with, by name (`random`, `joint`, a parent's `name/version`)."""
    tasks: Mapping[str, EvaluationSpec] = field(default_factory=dict[str, EvaluationSpec])
    """Task -> how its rows are read: what the version needs to answer them."""


@dataclass(frozen=True)
class AdapterVersion:
    name: str
    version: int
    model_id: str
    run_id: str
    digest: str
    """SHA-256 of the PEFT files (`workers.manifest.folder_digest` of the adapter folder)."""
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """`<task>/<metric>` -> value, and the base's own under `base/<task>/<metric>`; `@` is written `_at_`."""
    created_ms: int = 0


@dataclass(frozen=True)
class ReleaseRecord:
    """One move of `champion`, as it was written down before it was made. Never changed afterwards."""

    number: int
    """1 for the first move of a name."""
    name: str
    kind: Literal["promote", "rollback"]
    source: int
    """Version that was champion; 0 for none."""
    target: int
    who: str
    """user@machine."""
    when_ms: int
    reason: str
    figures: Mapping[str, float]
    digests: Mapping[str, str]
    """Of the target: its bytes, base, recipe, data."""
    done: bool
    """False while the move is under way, or was interrupted; the next command carries it out."""


@dataclass(frozen=True)
class Problem:
    """Something in the registry that is not as it was made."""

    name: str
    version: int | None
    words: str


class Registry(Protocol):
    """Runs, adapter versions and aliases. One writer: the controller or one command at a time."""

    def start_run(
        self, key: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """The run of `key`, created if absent (idempotent); its id."""
        ...

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None: ...

    def log_inputs(self, run_id: str, datasets: Mapping[str, tuple[str, str]]) -> None:
        """context (`training`, `validation`, `test`) -> (path, SHA-256)."""
        ...

    def log_evaluation(self, run_id: str, scores: Sequence[Scores], prefix: str = "") -> None:
        """Metrics, report JSON, plots as images and predictions as a table, on the run."""
        ...

    def log_text(self, run_id: str, path: str, text: str) -> None: ...

    def end_run(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None: ...

    def register(self, new: NewVersion) -> AdapterVersion:
        """Complete or absent: after a crash at any moment, calling again yields one whole version."""
        ...

    def versions(self, name: str | None = None) -> Sequence[AdapterVersion]: ...

    def version(self, name: str, ref: str) -> AdapterVersion:
        """`ref` is a number or an alias. Raises NoSuchVersion."""
        ...

    def download(self, version: AdapterVersion, to: Path) -> Path:
        """The adapter folder, verified against the version's digest. Raises RegistryConflict if altered."""
        ...

    def read_text(self, version: AdapterVersion, path: str) -> str:
        """A text file of the version (`README.md`, `recipe.yaml`, `eval/report.json`), verified.

        Raises NoSuchVersion if the version holds no such file.
        """
        ...

    def set_tags(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        """Add or change tags (`gate.status`). Raises BadInput for those that bind the version to bytes."""
        ...

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Any alias but `champion` and `previous`, which move by `promote` and `rollback` (BadInput)."""
        ...

    def promote(
        self,
        name: str,
        version: int,
        expected_champion: int | None,
        reason: str,
        figures: Mapping[str, float],
    ) -> AdapterVersion:
        """Move `champion` (and `previous`) by compare-and-swap and append a release record."""
        ...

    def rollback(self, name: str, expected_champion: int | None, reason: str) -> AdapterVersion:
        """Swap `champion` and `previous` by compare-and-swap, with a release record; asked again, once.

        Raises NoSuchVersion without a previous champion.
        """
        ...

    def finish_move(self, name: str) -> Sequence[ReleaseRecord]:
        """Carry out a move that was interrupted, if there is one; every move that was made, oldest first.

        For whoever is about to move a champion, before looking which version that is: an interrupted move
        may have set its aliases already.
        """
        ...

    def history(self, name: str) -> Sequence[ReleaseRecord]:
        """Every move of the champion of a name, oldest first; those that lost a race are not among them."""
        ...

    # ---- what holds for a whole name, or for all ----

    def conditions(self, name: str) -> Mapping[str, Any]:
        """What every version of a name must meet, beside its recipe's gates (`judgement.read_conditions`)."""
        ...

    def set_conditions(self, name: str, conditions: Mapping[str, Any]) -> None:
        """Raises NoSuchVersion for a name without versions."""
        ...

    def audit(self, name: str | None = None) -> Sequence[Problem]:
        """Every stored byte, tag and alias against what was registered; empty if nothing was altered."""
        ...
