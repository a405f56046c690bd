"""`chorus run`: from a recipe file to finished jobs, watched, interrupted and taken up again.

Where another command works in the home already, it works on these jobs too, and this one watches; if that one
ends first, this one takes over.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator import checkpoints
from orchestrator.api import errors
from orchestrator.api.outcome import outcome
from orchestrator.api.planning import releases
from orchestrator.api.service import caller
from orchestrator.api.submitting import Submitted, plan_of, put
from orchestrator.api.views import job_view, why
from orchestrator.commands.leftovers import remove_unpublished
from orchestrator.commands.live_table import watching
from orchestrator.commands.outcome_table import exit_code, show_outcome
from orchestrator.commands.output import console
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.commands.progress import RunProgress
from orchestrator.commands.submit import told_of_a_full_disk
from orchestrator.commands.working import work
from orchestrator.control.submission import read_order
from orchestrator.home import Home, HomeBusy
from orchestrator.job import Status
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from workers.types import BadInput

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the file."""

    file: Path
    home: Home
    cluster: ClusterChoice
    follow: bool = True


def run(parts: Parts, options: RunOptions) -> int:
    """Submit the file and work, or watch, until its jobs have finished; the exit code.

    A run that is unfinished is gone on with, one that is done is not done again. Raises BadInput before
    anything is made.
    """
    pipeline = load_pipeline(options.file)
    checkpoints.check()
    out = console()
    for notice in pipeline.notices:
        out.print(f"note: {notice}", soft_wrap=True)
    with told_of_a_full_disk(options.home, _same_again(options)), ExitStack() as stack:
        store = stack.enter_context(parts.store(options.home))
        plan, digests = plan_of(pipeline, lambda: parts.registry(options.home), stack, options.cluster.local)
        submitted = put(store, plan, digests, caller())
        if submitted.nothing_to_do:
            out.print(f"nothing to do: every step of {plan.name} is done")
            return _conclude(store, submitted.run, options, out)
        _check_ranks(submitted.jobs, options)
        if options.follow:
            return _to_the_end(parts, options, store, submitted, out)
    return _leave_to_background(options, submitted.run, out)


def _check_ranks(jobs: Sequence[JobRow], options: RunOptions) -> None:
    """A run keeps the number of ranks it was submitted with."""
    unfinished = [read_order(job.plan).job for job in jobs if not job.status.finished]
    ranks = max((job.world_size for job in unfinished), default=1)
    if options.cluster.local and ranks > 1:
        raise BadInput(
            f"{jobs[0].run} was begun on {ranks} ranks; go on with it without --local, or cancel it with "
            f"`chorus cancel {jobs[0].run}{options.home.flag()}`"
        )


# ---- working and watching -------------------------------------------------------------------------------


def _to_the_end(parts: Parts, options: RunOptions, store: Store, submitted: Submitted, out: Console) -> int:
    run, home = submitted.run, options.home
    jobs = ", ".join(job.name for job in submitted.jobs)
    out.print(f"{run}: {jobs}; in {home.folder}", soft_wrap=True)
    try:
        while store.unfinished_jobs(run):
            try:
                with home.claim():
                    remove_unpublished(
                        home.folder, releases(submitted.plan).values(), options.cluster.outlives_us
                    )
                    _work(parts, options, store, run, out)
            except HomeBusy:
                _watch(store, run, home, out)
    except KeyboardInterrupt:
        if store.unfinished_jobs(run):
            out.print(f"stopped; what is done is kept. To go on: {_same_again(options)}", soft_wrap=True)
            return errors.INTERRUPTED
    return _conclude(store, run, options, out)


def _work(parts: Parts, options: RunOptions, store: Store, run: str, out: Console) -> None:
    """Be the controller, of the whole queue, until this run has finished.

    Without Ray a host has one rank: others' jobs may want more, and are left to who comes next.
    """
    out.print("starting the MLflow server and the cluster")
    only = run if options.cluster.local else None
    with watching(RunProgress(store, run), out) as tick:
        work(parts, options.home, store, options.cluster, tick, only=only, until=run)


def _watch(store: Store, run: str, home: Home, out: Console) -> None:
    """Until the run has finished, or nobody works in the home any more."""
    out.print("another command works here and does these jobs too; watching", soft_wrap=True)
    with watching(RunProgress(store, run), out) as tick:
        while home.claimed() and store.unfinished_jobs(run):
            tick()
            time.sleep(LOOK_SECONDS)


def _conclude(store: Store, run_id: str, options: RunOptions, out: Console) -> int:
    jobs = store.jobs(run_id)
    views = [job_view(job) for job in jobs]
    show_outcome(out, views, outcome(store, jobs), options.home.folder_flag())
    for job in jobs:
        if job.status is not Status.SUCCEEDED:
            out.print(f"{job.name} {job.status}: {why(job)}", soft_wrap=True)
    return exit_code(views)


# ---- in the background ----------------------------------------------------------------------------------


def _leave_to_background(options: RunOptions, run_id: str, out: Console) -> int:
    """Let a process of its own do the run; it submits the same again, which changes nothing."""
    log = options.home.background_log
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator.main", *_arguments(options)]
    command += ["--home", str(options.home.folder)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **options.home.environment},
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
