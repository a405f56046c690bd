"""`chorus run`: from a recipe file to finished jobs, watched, interrupted and taken up again."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from orchestrator.commands import errors
from orchestrator.commands.home import Home
from orchestrator.commands.leftovers import remove_unpublished
from orchestrator.commands.live_table import watching
from orchestrator.commands.outcome import outcome
from orchestrator.commands.outcome_table import show_outcome
from orchestrator.commands.output import console
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.commands.planning import (
    adapter_digests,
    all_done,
    forget_lost_releases,
    one_rank,
    refuse_taken_releases,
    releases,
)
from orchestrator.commands.progress import RunProgress, why
from orchestrator.contracts import Cluster
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run, read_order
from orchestrator.disk import is_full, room
from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan
from orchestrator.recipe.pipeline import LoadedPipeline, load_pipeline
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from workers.types import BadInput


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the file."""

    file: Path
    home: Home
    cluster: ClusterChoice
    follow: bool = True


def run(parts: Parts, options: RunOptions) -> int:
    """Submit the file and work until its jobs have finished; the exit code.

    A run that is unfinished is gone on with, one that is done is not done again. Raises BadInput before
    anything is made, HomeBusy while another works in this home.
    """
    pipeline = load_pipeline(options.file)
    out = console()
    for notice in pipeline.notices:
        out.print(f"note: {notice}", soft_wrap=True)
    with ExitStack() as stack:
        stack.enter_context(_told_of_a_full_disk(options))
        stack.enter_context(options.home.claim())
        store = stack.enter_context(parts.store(options.home))
        plan, digests = _plan(parts, options, pipeline, stack)
        forget_lost_releases(store, plan)
        if all_done(store, plan):
            last = next(run.id for run in store.runs() if run.key == plan.key)
            out.print(f"nothing to do: every step of {plan.name} is done")
            return _conclude(store, last, options, out)
        refuse_taken_releases(store, plan)
        run_id = store.submit(new_run(plan, digests))
        jobs = store.jobs(run_id)
        _check_ranks(jobs, options)
        if options.follow:
            remove_unpublished(options.home.folder, releases(plan).values())
            return _work(parts, options, store, run_id, out)
    return _leave_to_background(options, run_id, out)


@contextmanager
def _told_of_a_full_disk(options: RunOptions) -> Generator[None]:
    """Raises DiskFull for what says so less well: SQLite names no folder, and nobody what is free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        where = Path(getattr(error, "filename", None) or options.home.folder)
        raise errors.DiskFull(
            f"the disk takes no more: {room(where)}; what is done is kept: free some space and go on with "
            f"`{_same_again(options)}`"
        ) from error


def _plan(
    parts: Parts, options: RunOptions, pipeline: LoadedPipeline, stack: ExitStack
) -> tuple[Plan, dict[str, str]]:
    """The registry is asked only for the adapters that the file names, and kept until the command ends."""
    digests: dict[str, str] = {}
    if pipeline.external_adapters:
        digests = adapter_digests(stack.enter_context(parts.registry(options.home)), pipeline)
    plan = make_plan(pipeline, digests)
    return (one_rank(plan) if options.cluster.local else plan), digests


def _check_ranks(jobs: Sequence[JobRow], options: RunOptions) -> None:
    """A run keeps the number of ranks it was submitted with."""
    unfinished = [read_order(job.plan).job for job in jobs if not job.status.finished]
    ranks = max((job.world_size for job in unfinished), default=1)
    if options.cluster.local and ranks > 1:
        raise BadInput(
            f"{jobs[0].run} was begun on {ranks} ranks; go on with it without --local, or cancel it with "
            f"`chorus cancel {jobs[0].run}{options.home.flag()}`"
        )


# ---- working --------------------------------------------------------------------------------------------


def _work(parts: Parts, options: RunOptions, store: Store, run_id: str, out: Console) -> int:
    home = options.home
    jobs = ", ".join(job.name for job in store.jobs(run_id))
    out.print(f"{run_id}: {jobs}; in {home.folder}", soft_wrap=True)
    try:
        with _log_to(home.log), _terminated_like_interrupted(), ExitStack() as stack:
            out.print("starting the MLflow server and the cluster")
            cluster = stack.enter_context(_beside_the_server(parts, options))
            registry = stack.enter_context(parts.registry(home))
            controller = Controller(store, cluster, registry, home.folder, run_id)
            tick = stack.enter_context(watching(RunProgress(store, run_id), out))
            controller.run(on_tick=tick)
    except KeyboardInterrupt:
        if not store.unfinished_jobs(run_id):
            return _conclude(store, run_id, options, out)
        out.print(f"stopped; what is done is kept. To go on: {_same_again(options)}", soft_wrap=True)
        return errors.INTERRUPTED
    return _conclude(store, run_id, options, out)


@contextmanager
def _beside_the_server(parts: Parts, options: RunOptions) -> Generator[Cluster]:
    """The cluster, with the registry's server started meanwhile: each takes seconds.

    Ray wants the thread that lives on, so the server has the other one. An error of either ends both.
    """
    with ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool:
            server = pool.submit(stack.enter_context, parts.server(options.home))
            cluster = stack.enter_context(parts.cluster(options.home, options.cluster))
            server.result()
        yield cluster


def _conclude(store: Store, run_id: str, options: RunOptions, out: Console) -> int:
    jobs = store.jobs(run_id)
    show_outcome(out, jobs, outcome(store, jobs), options.home)
    for job in jobs:
        if job.status is not Status.SUCCEEDED:
            out.print(f"{job.name} {job.status}: {why(job)}", soft_wrap=True)
    return exit_code(jobs)


def exit_code(jobs: Sequence[JobRow]) -> int:
    """Of a run's jobs. Those that failed only because another did, or was cancelled, do not count."""
    statuses = {job.status for job in jobs if job.reason is not Reason.PARENT_FAILED}
    if any(not status.finished for status in statuses):
        return errors.UNFINISHED
    if Status.FAILED in statuses:
        return errors.FAILED
    return errors.CANCELLED if Status.CANCELLED in statuses else errors.OK


@contextmanager
def _log_to(file: Path) -> Generator[None]:
    """Send what is logged to the home's log: on the screen it would break the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _QuietFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        handler.close()


class _QuietFile(logging.FileHandler):
    """A log on a full disk loses lines; it must not print tracebacks between those of the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _terminated_like_interrupted() -> Generator[None]:
    """SIGTERM ends the run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


# ---- in the background ----------------------------------------------------------------------------------


def _leave_to_background(options: RunOptions, run_id: str, out: Console) -> int:
    """Let a process of its own do the run; it submits the same again, which changes nothing."""
    log = options.home.background_log
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator.main", *_arguments(options)]
    command += ["--home", str(options.home.folder)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    out.print(
        f"{run_id} runs in the background (process {process.pid}); its words go to {log}", soft_wrap=True
    )
    flag = options.home.flag()
    out.print(
        f"to watch: chorus status {run_id}{flag}; to stop: chorus cancel {run_id}{flag}", soft_wrap=True
    )
    return errors.OK


def _arguments(options: RunOptions) -> list[str]:
    choice = options.cluster
    flags = ["--local"] if choice.local else []
    flags += ["--cpus", str(choice.cpus)] if choice.cpus else []
    flags += ["--ray-address", choice.address] if choice.address else []
    return ["run", str(options.file), *flags]


def _same_again(options: RunOptions) -> str:
    return f"chorus {' '.join(_arguments(options))}{options.home.flag()}"
