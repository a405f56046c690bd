"""A planned job as the store keeps it; from then on no recipe file is read again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.plan.steps import Plan, PlannedJob, RegisterWhat, Step, TrainWhat
from orchestrator.queue import Need
from orchestrator.store.rows import NewJob, NewRun

NEEDS: dict[str, Need] = {
    "evaluate_base": Need.HOST,
    "train": Need.SLOT,
    "evaluate": Need.HOST,
    "fuse": Need.CPU,
    "search": Need.HOST,
    "register": Need.NOTHING,
    "promote": Need.NOTHING,
    "release": Need.CPU,
}
"""What a step of each kind needs from the cluster."""


@dataclass(frozen=True)
class Order:
    """A planned job, and what else carrying it out takes."""

    job: PlannedJob
    experiment: str
    """The registry's experiment: the pipeline's name."""
    adapters: Mapping[str, str]
    """NAME@REF -> digest of the registered adapters it was planned with: an alias may move meanwhile."""

    @cached_property
    def series(self) -> str:
        """The step that makes the adapter; names its curve, its checkpoints and the registry's run."""
        return self.registered.adapter

    @cached_property
    def registered(self) -> RegisterWhat:
        what = self.job.step("register").what
        assert isinstance(what, RegisterWhat)
        return what

    @cached_property
    def train(self) -> TrainWhat | None:
        """How the job's adapter is trained; None if it is fused from files."""
        what = next(step.what for step in self.job.steps if step.id == self.series)
        return what if isinstance(what, TrainWhat) else None

    def seat_need(self, remaining: tuple[Step, ...]) -> Need:
        """What the next of the remaining steps needs; a job that will train takes its slot from the start."""
        need = NEEDS[remaining[0].kind] if remaining else Need.NOTHING
        if need is Need.HOST and any(step.kind == "train" for step in remaining):
            return Need.SLOT
        return need


def new_run(plan: Plan, adapter_digests: Mapping[str, str] | None = None) -> NewRun:
    """What `Store.submit` takes. `adapter_digests` are those the plan was made with."""
    jobs = tuple(_new_job(job, plan.name, adapter_digests or {}) for job in plan.jobs)
    return NewRun(plan.name, plan.key, plan.recipe, jobs)


def _new_job(job: PlannedJob, experiment: str, adapters: Mapping[str, str]) -> NewJob:
    order = Order(job, experiment, adapters)
    return NewJob(
        name=job.name,
        kind=job.kind,
        recipe=job.recipe,
        plan={"job": job.to_json(), "experiment": experiment, "adapters": dict(adapters)},
        recipe_hash=job.recipe_digest,
        series=order.series,
        depends_on=job.depends_on,
        priority=job.priority,
    )


def read_order(plan: Mapping[str, Any]) -> Order:
    """The order of a stored job, from `JobRow.plan`."""
    return Order(PlannedJob.from_json(plan["job"]), plan["experiment"], plan["adapters"])
