"""From a recipe file to its plan, with the registered adapters it names looked up. Makes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from orchestrator.contracts import NoSuchVersion, Registry
from orchestrator.control.submission import read_order
from orchestrator.plan.steps import Plan, ReleaseWhat
from orchestrator.recipe.pipeline import LoadedPipeline
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from workers.types import BadInput


def adapter_digests(registry: Registry, pipeline: LoadedPipeline) -> dict[str, str]:
    """NAME@REF -> digest of the registered adapters a fusion wants. Raises BadInput for another base's.

    One that is not registered is left out: the plan refuses it.
    """
    found: dict[str, str] = {}
    for parent, recipe in pipeline.parents():
        if parent.adapter is None:
            continue
        name, _, ref = parent.adapter.partition("@")
        try:
            version = registry.version(name, ref)
        except NoSuchVersion:
            continue
        if version.tags.get("base.digest") != recipe.base.digests.all:
            raise BadInput(
                f"{pipeline.path}: fuse.adapters: {parent.adapter} was trained on another base than "
                f"{recipe.base.slug}; only adapters of one base can be fused"
            )
        found[parent.adapter] = version.digest
    return found


def one_rank(plan: Plan) -> Plan:
    """The same plan on hosts of one process: what is computed, and so every step, stays the same."""
    return replace(plan, jobs=tuple(replace(job, world_size=1) for job in plan.jobs))


def releases(plan: Plan) -> dict[str, Path]:
    """Release step -> the folder it writes."""
    return {
        step.id: Path(step.what.out) for step in plan.steps.values() if isinstance(step.what, ReleaseWhat)
    }


def releases_of(jobs: Iterable[JobRow]) -> tuple[Path, ...]:
    """The folders that the releases of submitted jobs write."""
    whats = [step.what for job in jobs for step in read_order(job.plan).job.steps]
    return tuple(Path(what.out) for what in whats if isinstance(what, ReleaseWhat))


def forget_lost_releases(store: Store, plan: Plan) -> None:
    """A release whose folder was removed is to be written again; the store would take it for done."""
    done = store.steps.finished(set(releases(plan)))
    for step, folder in releases(plan).items():
        if step in done and not folder.exists():
            store.steps.forget(step)


def refuse_taken_releases(store: Store, plan: Plan) -> None:
    """Raises BadInput before hours of training if a release could not be written after them.

    A run that is gone on with may have written its folder just before it was killed: the export looks then.
    """
    begun = any(not run.status.finished for run in store.runs_of_key(plan.key))
    done = store.steps.finished(set(releases(plan)))
    for step, folder in releases(plan).items():
        if folder.exists() and step not in done and not begun:
            raise BadInput(
                f"fuse.release.out: {folder} exists already and is not of this run; "
                "move it away or name another folder"
            )


def all_done(store: Store, plan: Plan) -> bool:
    """Whether the last run of this plan has succeeded and nothing of it is to be done again."""
    last = next(iter(store.runs_of_key(plan.key)), None)
    steps = set(plan.steps)
    return last is not None and last.status == "SUCCEEDED" and store.steps.finished(steps) == steps
