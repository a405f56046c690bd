"""From a recipe file to a run in the store, or a refusal before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

from orchestrator.api.planning import (
    adapter_digests,
    all_done,
    forget_lost_releases,
    one_rank,
    refuse_taken_releases,
)
from orchestrator.contracts import Registry
from orchestrator.control.submission import new_run
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan
from orchestrator.recipe.pipeline import LoadedPipeline
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store


@dataclass(frozen=True)
class Submitted:
    run: str
    plan: Plan
    jobs: tuple[JobRow, ...]
    nothing_to_do: bool
    """Every step of it is done already, by that run."""


def put(store: Store, plan: Plan, digests: dict[str, str], who: str, key: str | None = None) -> Submitted:
    """Submit a plan, once. Raises BadInput for a release that could not be written, or a key used before."""
    forget_lost_releases(store, plan)
    if key is None and all_done(store, plan):
        last = store.runs_of_key(plan.key)[0].id
        return Submitted(last, plan, store.jobs(last), nothing_to_do=True)
    refuse_taken_releases(store, plan)
    run = store.submit(replace(new_run(plan, digests), token=key), who)
    return Submitted(run, plan, store.jobs(run), nothing_to_do=False)


def plan_of(
    pipeline: LoadedPipeline,
    open_registry: Callable[[], AbstractContextManager[Registry]],
    stack: ExitStack,
    local: bool = False,
) -> tuple[Plan, dict[str, str]]:
    """The registry is asked only for the adapters that the file names, and kept until `stack` ends."""
    digests: dict[str, str] = {}
    if pipeline.external_adapters:
        digests = adapter_digests(stack.enter_context(open_registry()), pipeline)
    plan = make_plan(pipeline, digests)
    return (one_rank(plan) if local else plan), digests
