"""The values a plan is made of: steps, what each does, and the jobs that hold them. Pure; stored as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, TypeAdapter

from orchestrator.recipe.model_folder import BaseDigests
from workers.types import BaseSpec, EvaluationSpec, JobSpec, RuleOptions, SearchTask

JobKind = Literal["train", "fuse"]
StepKind = Literal["evaluate_base", "train", "evaluate", "fuse", "search", "register", "promote", "release"]
Interned: TypeAlias = Annotated[str, AfterValidator(sys.intern)]
"""Of all jobs that have it one string, in place of one each: see `queue.Waiting`."""

# ---- what a step does -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateWhat:
    """Score the base (`adapter` None), a step's adapter (its id), or a registered one (NAME@REF)."""

    task: str
    evaluation: EvaluationSpec
    dataset_digest: str
    adapter: str | None = None


@dataclass(frozen=True)
class TrainWhat:
    """Train one adapter. `spec` lacks its job, attempt and folders; `attempt` fills them in."""

    spec: JobSpec
    train_digest: str
    validation_digest: str
    teachers: tuple[str, ...] = ()
    """Of a distillation: each a train step's id or a registered NAME@REF, in the order of the spec's."""
    start: str | None = None
    """Id of the step whose adapter the student starts from."""

    def attempt(
        self,
        job: str,
        attempt: int,
        checkpoint_dir: str,
        folder_of: Callable[[str], str],
        checkpoint_url: str = "",
    ) -> JobSpec:
        """`folder_of` gives the folder of an adapter that is named here."""
        spec = replace(
            self.spec,
            job=job,
            attempt=attempt,
            checkpoint_dir=checkpoint_dir,
            checkpoint_url=checkpoint_url,
        )
        if spec.distill is None:
            return spec
        teachers = tuple(
            replace(teacher, adapter_dir=folder_of(adapter) if adapter else "")
            for teacher, adapter in zip_longest(spec.distill.teachers, self.teachers)
        )
        start = folder_of(self.start) if self.start else ""
        return replace(spec, distill=replace(spec.distill, teachers=teachers, start=start))


@dataclass(frozen=True)
class FuseWhat:
    """Fuse adapters: each a train step's id or a registered NAME@REF, beside its weight."""

    rule: str
    rank: int | None
    adapters: tuple[tuple[str, float], ...]
    options: RuleOptions = field(default_factory=RuleOptions)


@dataclass(frozen=True)
class SearchWhat:
    """Fuse with the best weights of some trials on validation rows; `fuse` has those of the first."""

    fuse: FuseWhat
    tasks: tuple[SearchTask, ...]
    trials: int
    groups: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class RegisterWhat:
    """Make an adapter a version. Every mapping goes from a task to the id of an evaluate step."""

    name: str
    task: str
    adapter: str
    """Id of the train or fuse step."""
    scores: Mapping[str, str]
    base_scores: Mapping[str, str]
    parents: tuple[str, ...]
    """Of a fused version: each a register step's id or a registered NAME@REF."""
    recipe_yaml: str
    recipe_digest: str
    data_digest: str
    base: BaseDigests
    controls: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    """Of a fused version: what it is measured beside -> task -> evaluate step. `fused` is the version."""


@dataclass(frozen=True)
class PromoteWhat:
    """Judge a version with `judgement.judge`; every key is `<task>.<metric>`."""

    name: str
    promote: bool
    gates: Mapping[str, str]
    champion_margin: Mapping[str, float]
    retention: Mapping[str, str]
    scores: Mapping[str, str]
    """Task -> id of the evaluate step of the version itself."""
    parent_scores: Mapping[str, str]
    """Task -> id of the evaluate step of the parent of that task; empty unless fused."""
    non_inferiority: Mapping[str, float] = field(default_factory=dict[str, float])
    worst_task: str | None = None
    structure: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReleaseWhat:
    """Write the champion of `name` to the absolute folder `out`."""

    name: str
    out: str
    merged: bool


What = EvaluateWhat | TrainWhat | FuseWhat | SearchWhat | RegisterWhat | PromoteWhat | ReleaseWhat


def registered_adapters(what: What) -> frozenset[str]:
    """The NAME@REF of which a host or a CPU task needs the files."""
    return frozenset(name for name in _adapters(what) if "@" in name)


def made_adapters(what: What) -> frozenset[str]:
    """The steps of whose adapters a host or a CPU task needs the files."""
    return frozenset(name for name in _adapters(what) if "@" not in name)


def _adapters(what: What) -> Iterator[str]:
    match what:
        case EvaluateWhat():
            named = (what.adapter,)
        case TrainWhat():
            named = (*what.teachers, what.start)
        case FuseWhat():
            named = tuple(adapter for adapter, _ in what.adapters)
        case SearchWhat():
            named = tuple(adapter for adapter, _ in what.fuse.adapters)
        case RegisterWhat() | PromoteWhat() | ReleaseWhat():
            named = ()
    yield from (name for name in named if name)


@dataclass(frozen=True)
class Step:
    id: str
    kind: StepKind
    needs: tuple[str, ...]
    what: What


# ---- jobs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What is known of a training job before it runs."""

    adapter_parameters: int
    adapter_bytes: int
    """In float32, as PEFT saves it, header excluded."""
    num_steps: int
    train_rows: int


@dataclass(frozen=True)
class PlannedJob:
    """Steps in an order in which they can be done; a step needed from another job is that job's to do."""

    name: str
    kind: JobKind
    depends_on: tuple[str, ...]
    steps: tuple[Step, ...]
    base: BaseSpec
    world_size: int
    host_key: Interned
    """Jobs with one key can share a host."""
    task: str
    recipe: Mapping[str, Any]
    """Canonical form."""
    recipe_digest: str
    priority: int = 50
    team: Interned | None = None
    max_duration: int | None = None
    """Seconds."""
    estimate: Estimate | None = None

    def step(self, kind: StepKind) -> Step:
        """The first step of a kind."""
        return next(step for step in self.steps if step.kind == kind)

    def to_json(self) -> dict[str, Any]:
        return _JOB.dump_python(self, mode="json")

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> PlannedJob:
        """The inverse of `to_json`."""
        return _JOB.validate_python(value)


@dataclass(frozen=True)
class Plan:
    name: str
    key: str
    """Content hash of the pipeline: submitting it twice is submitting it once."""
    jobs: tuple[PlannedJob, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Canonical form of the pipeline."""

    @property
    def steps(self) -> dict[str, Step]:
        """Every step once, by id."""
        return {step.id: step for job in self.jobs for step in job.steps}


_JOB: TypeAdapter[PlannedJob] = TypeAdapter(PlannedJob)
