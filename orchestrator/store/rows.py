"""What the store takes and gives: frozen rows, no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.job import Reason, Status
from workers.types import StepDone, Validated

JobKind = Literal["train", "fuse"]


@dataclass(frozen=True)
class NewJob:
    """One job of a run about to be submitted. `depends_on` holds names of jobs of the same run."""

    name: str
    kind: JobKind
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    recipe_hash: str
    series: str
    """The step whose curves this job shows: equal training is one series, whichever job runs it."""
    depends_on: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class NewRun:
    """A pipeline about to be submitted. `key` is the content hash: one that is unfinished is the same run."""

    name: str
    key: str
    recipe: Mapping[str, Any]
    jobs: tuple[NewJob, ...]
    token: str | None = None
    """The submitter's own key: a second submission under it is the first one, finished or not."""


@dataclass(frozen=True)
class RunRow:
    id: str
    name: str
    key: str
    recipe: Mapping[str, Any]
    submitted_at: float
    status: Status
    """Derived from its jobs, never stored."""
    token: str | None = None


@dataclass(frozen=True)
class JobRow:
    id: str
    run: str
    name: str
    kind: JobKind
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    recipe_hash: str
    series: str
    depends_on: tuple[str, ...]
    """Ids of jobs of the same run."""
    priority: int
    status: Status
    reason: Reason
    message: str
    attempt: int
    """0 before the first placement."""
    host: str | None
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class StepRow:
    """A finished step. The row is the proof: a step is done if and only if it is there."""

    id: str
    kind: str
    job: str
    """The job that did it; later jobs with the same step use its result."""
    result: Mapping[str, Any]
    finished_at: float


@dataclass(frozen=True)
class EventRow:
    id: int
    job: str
    at: float
    who: str
    attempt: int
    before: Status | None
    after: Status
    reason: Reason
    message: str


@dataclass(frozen=True)
class MetricRow:
    """One optimizer step. `loss` and `grad_norm` are None when they were not finite."""

    step: int
    attempt: int
    at: float
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    tokens: int
    seconds: float
    skipped: bool
    eval_loss: float | None = None


RequestKind = Literal["cancel", "pause", "resume", "priority"]


@dataclass(frozen=True)
class Request:
    """What someone asks the controller to do with a job."""

    id: int
    job: str
    kind: RequestKind
    who: str
    value: Any = None
    """Of `priority`: the new one."""


@dataclass(frozen=True)
class Board:
    """Something that the controller shows of itself, and when it last did."""

    value: Any
    at: float
    age: float
    """Seconds, by the clock of who reads it."""


@dataclass(frozen=True)
class Progress:
    """How far a job's training is, as its row shows it."""

    step: int
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Report:
    """What one attempt has reported since the last time. A stale attempt's is dropped whole."""

    job: str
    attempt: int
    series: str
    points: tuple[StepDone | Validated, ...]
    progress: Progress | None


@dataclass(frozen=True)
class ValidationRow:
    step: int
    attempt: int
    at: float
    loss: float | None


@dataclass(frozen=True)
class Curves:
    """Points of one series that the registry has not got yet."""

    steps: tuple[MetricRow, ...] = ()
    validations: tuple[ValidationRow, ...] = ()
