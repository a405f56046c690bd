"""What a run came to, by its finished steps: scores side by side, versions, releases. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.control.submission import read_order
from orchestrator.gate import METRICS, retained
from orchestrator.plan.steps import PlannedJob, PromoteWhat, RegisterWhat
from orchestrator.store.rows import JobRow, StepRow
from orchestrator.store.store import Store

HEADLINES = tuple(name for name in METRICS if name != "loss")


@dataclass(frozen=True)
class Score:
    """One metric of one task: of the base, of the adapter trained for it, and of the fused one."""

    task: str
    metric: str
    base: float | None = None
    adapter: float | None = None
    fused: float | None = None
    retention: float | None = None
    """Of the fused against the adapter: fused/adapter, or adapter/fused where lower is better."""


@dataclass(frozen=True)
class Made:
    """The version a job registered."""

    job: str
    name: str
    version: int
    champion: bool
    findings: tuple[str, ...]
    """What its gates found, in words."""


@dataclass(frozen=True)
class Release:
    out_dir: str
    merged: bool
    name: str


@dataclass(frozen=True)
class Outcome:
    scores: tuple[Score, ...]
    versions: tuple[Made, ...]
    releases: tuple[Release, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_outcome(value: Mapping[str, Any]) -> Outcome:
    """What `to_json` gave."""
    return Outcome(
        scores=tuple(Score(**score) for score in value["scores"]),
        versions=tuple(replace(Made(**made), findings=tuple(made["findings"])) for made in value["versions"]),
        releases=tuple(Release(**release) for release in value["releases"]),
    )


def outcome(store: Store, jobs: Sequence[JobRow]) -> Outcome:
    """What the jobs have come to so far."""
    planned = [read_order(job.plan).job for job in jobs]
    done = store.steps.read({step.id for job in planned for step in job.steps})
    return Outcome(
        scores=tuple(score for job in planned for score in _scores(job, planned, done)),
        versions=tuple(made for job in planned for made in _versions(job, done)),
        releases=tuple(release for job in planned for release in _releases(job, done)),
    )


# ---- scores ---------------------------------------------------------------------------------------------


def _scores(job: PlannedJob, planned: Sequence[PlannedJob], done: Mapping[str, StepRow]) -> list[Score]:
    """The rows of a training job beside the fusion it went into; of a fusion, those of registered parents."""
    if job.kind == "train":
        fusion = next((other for other in planned if job.name in other.depends_on), None)
        return _rows(job.task, job, fusion, done)
    trained = {step.id for other in planned if other.kind == "train" for step in other.steps}
    outside = [task for task, step in _promoted(job).parent_scores.items() if step not in trained]
    return [score for task in outside for score in _rows(task, None, job, done)]


def _rows(
    task: str, trained: PlannedJob | None, fusion: PlannedJob | None, done: Mapping[str, StepRow]
) -> list[Score]:
    first = trained or fusion
    assert first is not None
    base = _metrics(_registered(first).base_scores.get(task), done)
    if trained is not None:
        adapter = _metrics(_promoted(trained).scores.get(task), done)
    else:
        adapter = _metrics(_promoted(first).parent_scores.get(task), done)
    fused = _metrics(_promoted(fusion).scores.get(task) if fusion else None, done)
    names = [name for name in HEADLINES if name in base or name in adapter or name in fused]
    return [_score(task, name, base.get(name), adapter.get(name), fused.get(name)) for name in names]


def _score(task: str, metric: str, base: float | None, adapter: float | None, fused: float | None) -> Score:
    kept = retained(metric, fused, adapter) if fused is not None and adapter is not None else None
    return Score(task, metric, base, adapter, fused, kept)


def _metrics(step: str | None, done: Mapping[str, StepRow]) -> dict[str, float]:
    """What an evaluation measured; a figure that was not finite is stored as a word."""
    if step is None or step not in done:
        return {}
    metrics: Mapping[str, Any] = done[step].result["report"]["metrics"]
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _registered(job: PlannedJob) -> RegisterWhat:
    what = job.step("register").what
    assert isinstance(what, RegisterWhat)
    return what


def _promoted(job: PlannedJob) -> PromoteWhat:
    what = job.step("promote").what
    assert isinstance(what, PromoteWhat)
    return what


# ---- what was made --------------------------------------------------------------------------------------


def _versions(job: PlannedJob, done: Mapping[str, StepRow]) -> list[Made]:
    registered = done.get(job.step("register").id)
    if registered is None:
        return []
    promoted = done.get(job.step("promote").id)
    judged: Mapping[str, Any] = promoted.result if promoted else {}
    words = tuple(str(finding["words"]) for finding in judged.get("findings", ()))
    name, version = str(registered.result["name"]), int(registered.result["version"])
    return [Made(job.name, name, version, bool(judged.get("champion")), words)]


def _releases(job: PlannedJob, done: Mapping[str, StepRow]) -> list[Release]:
    results = [done[step.id].result for step in job.steps if step.kind == "release" and step.id in done]
    return [Release(str(r["out_dir"]), bool(r.get("merged")), _registered(job).name) for r in results]
