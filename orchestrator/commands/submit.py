"""`chorus submit`, and the first half of `chorus run`: a recipe file becomes a run, or is refused."""

from __future__ import annotations

import getpass
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orchestrator.commands import errors
from orchestrator.commands.fitting import FitView, fit_views, fit_words
from orchestrator.commands.home import Home
from orchestrator.commands.output import Format, emit
from orchestrator.commands.parts import Parts
from orchestrator.commands.planning import (
    adapter_digests,
    all_done,
    forget_lost_releases,
    one_rank,
    refuse_taken_releases,
)
from orchestrator.commands.views import job_view, run_view
from orchestrator.control.submission import new_run
from orchestrator.disk import is_full, room
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan
from orchestrator.recipe.pipeline import LoadedPipeline, load_pipeline
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store


@dataclass(frozen=True)
class Submitted:
    run: str
    plan: Plan
    jobs: tuple[JobRow, ...]
    nothing_to_do: bool
    """Every step of it is done already, by that run."""


def submit(parts: Parts, home: Home, file: Path, key: str | None, format: Format) -> None:
    """Put the file's jobs into the queue, on disk at the return. Raises BadInput before anything is made."""
    pipeline = load_pipeline(file)
    again = f"chorus submit {file}{f' --key {key}' if key else ''}{home.flag()}"
    with told_of_a_full_disk(home, again), ExitStack() as stack:
        store = stack.enter_context(parts.store(home))
        plan, digests = plan_of(parts, home, pipeline, stack)
        fit = fit_views(store, plan, pipeline)
        done = put(store, plan, digests, key)
        jobs = [{**job_view(job), "fit": fit.get(job.name)} for job in done.jobs]
        value = {**run_view(store.run(done.run)), "jobs": jobs}
        emit(value, format, lambda out: _print(out, done, home, pipeline.notices, fit))


def _print(
    out: Console, done: Submitted, home: Home, notices: Sequence[str], fit: Mapping[str, FitView]
) -> None:
    for notice in notices:
        out.print(f"note: {notice}", soft_wrap=True)
    if done.nothing_to_do:
        out.print(f"nothing to do: every step of {done.plan.name} is done, by {done.run}", soft_wrap=True)
        return
    out.print(f"{done.run}: {', '.join(job.name for job in done.jobs)}", soft_wrap=True)
    for name, view in fit.items():
        out.print(f"{name}: {fit_words(view)}", soft_wrap=True)
    if home.claimed():
        out.print(f"to watch: chorus status {done.run}{home.flag()}", soft_wrap=True)
    else:
        out.print(f"nobody works here yet; `chorus serve{home.flag()}` does", soft_wrap=True)


def put(store: Store, plan: Plan, digests: dict[str, str], key: str | None = None) -> Submitted:
    """Submit a plan, once. Raises BadInput for a release that could not be written, or a key used before."""
    forget_lost_releases(store, plan)
    if key is None and all_done(store, plan):
        last = store.runs_of_key(plan.key)[0].id
        return Submitted(last, plan, store.jobs(last), nothing_to_do=True)
    refuse_taken_releases(store, plan)
    run = store.submit(replace(new_run(plan, digests), token=key), user())
    return Submitted(run, plan, store.jobs(run), nothing_to_do=False)


def plan_of(
    parts: Parts, home: Home, pipeline: LoadedPipeline, stack: ExitStack, local: bool = False
) -> tuple[Plan, dict[str, str]]:
    """The registry is asked only for the adapters that the file names, and kept until the command ends."""
    digests: dict[str, str] = {}
    if pipeline.external_adapters:
        digests = adapter_digests(stack.enter_context(parts.registry(home)), pipeline)
    plan = make_plan(pipeline, digests)
    return (one_rank(plan) if local else plan), digests


def user() -> str:
    """Who gives this command, for the events."""
    try:
        return getpass.getuser()[:80]
    except (KeyError, OSError):
        return "user"


@contextmanager
def told_of_a_full_disk(home: Home, again: str) -> Generator[None]:
    """Raises DiskFull for what says so less well: SQLite names no folder, and nobody what is free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        where = Path(getattr(error, "filename", None) or home.folder)
        raise errors.DiskFull(
            f"the disk takes no more: {room(where)}; what is done is kept: free some space and go on with "
            f"`{again}`"
        ) from error
