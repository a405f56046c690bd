"""`ps`, `status`, `logs`: the store read, whether or not anybody works."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from orchestrator.commands.home import Home
from orchestrator.commands.outcome import outcome
from orchestrator.commands.outcome_table import show_outcome
from orchestrator.commands.output import Format, duration, emit, figure, grid, moment
from orchestrator.commands.parts import Parts
from orchestrator.commands.queue_view import Queue, seconds_left
from orchestrator.commands.run import exit_code
from orchestrator.commands.views import event_view, job_view, metric_view, run_view, steps_view
from orchestrator.store.rows import JobRow
from orchestrator.store.store import NoSuchJob, Store

FOLLOW_SECONDS = 0.5
JOB_COLUMNS = (*("job", "team", "status", "#", "host", "step", "loss", "tokens/s", "time", "left", "why"),)
FIGURES = ("#", "step", "loss", "tokens/s", "time", "left")


# ---- finding --------------------------------------------------------------------------------------------


def open_store(parts: Parts, home: Home, stack: ExitStack) -> Store:
    """The store of a home. Raises NoSuchJob if nothing was ever submitted there, and makes nothing."""
    if not home.has_store:
        raise NoSuchJob(f"nothing was submitted in {home.folder} yet; `chorus run FILE` does that")
    return stack.enter_context(parts.store(home))


def find_jobs(store: Store, reference: str) -> tuple[JobRow, ...]:
    """The one job, or all jobs of the run, that a user means: an id, or a name in the newest run that has it.

    Raises NoSuchJob.
    """
    jobs = store.jobs()
    exact = tuple(job for job in jobs if reference in (job.id, job.run))
    if exact:
        return exact
    for run in store.runs():
        of_run = [job for job in jobs if job.run == run.id]
        named = [job for job in of_run if job.name == reference] or (of_run if run.name == reference else [])
        if named:
            return tuple(named)
    raise NoSuchJob(f"there is no job or run {reference!r}; `chorus ps --all` shows them")


def find_job(store: Store, reference: str) -> JobRow:
    """One job. Raises NoSuchJob, also for a run of several."""
    job, *others = find_jobs(store, reference)
    if others:
        names = ", ".join(each.name for each in (job, *others))
        raise NoSuchJob(f"{reference} is a run of several jobs; name one of {names}")
    return job


# ---- ps and status --------------------------------------------------------------------------------------


def ps(parts: Parts, home: Home, everything: bool, format: Format) -> None:
    """Jobs that are not finished and those of the newest run, or all."""
    with ExitStack() as stack:
        store = open_store(parts, home, stack) if home.has_store else None
        jobs = _views(store, _shown(store, everything)) if store else []
        emit(jobs, format, lambda out: _print_jobs(out, jobs, home))


def _shown(store: Store, everything: bool) -> tuple[JobRow, ...]:
    if everything:
        return store.jobs()
    newest = store.newest_run()
    found = {job.id: job for job in (*store.unfinished_jobs(), *(store.jobs(newest.id) if newest else ()))}
    return tuple(sorted(found.values(), key=lambda job: job.submitted_at))


def _views(store: Store, jobs: Iterable[JobRow]) -> list[dict[str, Any]]:
    """What only the store as a whole tells of a job goes beside what its row does."""
    queue = Queue.read(store)
    return [
        {**job_view(job), "position": queue.position(job), "seconds_left": seconds_left(store, job)}
        for job in jobs
    ]


def _print_jobs(out: Console, jobs: Sequence[dict[str, Any]], home: Home) -> None:
    if not jobs:
        out.print(f"no jobs in {home.folder}; `chorus run FILE` submits some", soft_wrap=True)
        return
    out.print(grid(JOB_COLUMNS, [_cells(job) for job in jobs], right=FIGURES))
    if any(job["finished_at"] is None for job in jobs) and not home.claimed():
        out.print(
            "nobody works here; `chorus serve`, or the same `chorus run FILE`, goes on with the unfinished",
            soft_wrap=True,
        )


def _cells(job: Mapping[str, Any]) -> tuple[str, ...]:
    training = job["status"] == "RUNNING" and job["seconds_left"] is not None
    return (
        *(job["id"], job["team"], job["status"], str(job["position"] or ""), job["host"] or ""),
        f"{job['step']}/{job['num_steps']}" if job["num_steps"] else "",
        figure(job["loss"]),
        f"{job['tokens_per_second']:,.0f}" if training and job["tokens_per_second"] else "",
        duration(_running_time(job)),
        duration(job["seconds_left"]),
        f"{job['reason_words']}: {job['message']}" if job["message"] else job["reason_words"],
    )


def _running_time(job: Mapping[str, Any]) -> float | None:
    if job["started_at"] is None:
        return None
    return (job["finished_at"] or time.time()) - job["started_at"]


def status(parts: Parts, home: Home, reference: str, format: Format) -> int:
    """One job or one run in full; the exit code tells its state."""
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        jobs = find_jobs(store, reference)
        if reference in (jobs[0].id, jobs[0].name):
            _one_job(store, jobs[0], format)
        else:
            _one_run(store, jobs, home, format)
        return exit_code(jobs)


def _one_job(store: Store, job: JobRow, format: Format) -> None:
    steps = steps_view(job, store.finished_steps())
    events = [event_view(event) for event in store.events(job.id)]
    (view,) = _views(store, [job])
    value = {**view, "steps": steps, "events": events}

    def table(out: Console) -> None:
        out.print(grid(JOB_COLUMNS, [_cells(view)], right=FIGURES))
        out.print()
        out.print(grid(("step", "done"), [(step["words"], "yes" if step["done"] else "") for step in steps]))
        out.print()
        _print_lines(out, events)

    emit(value, format, table)


def _one_run(store: Store, jobs: Sequence[JobRow], home: Home, format: Format) -> None:
    run = store.run(jobs[0].run)
    found = outcome(store, jobs)
    views = _views(store, jobs)
    value = {**run_view(run), "jobs": views, "outcome": found.to_json()}

    def table(out: Console) -> None:
        out.print(f"{run.id} {run.status}, submitted {moment(run.submitted_at)}")
        _print_jobs(out, views, home)
        show_outcome(out, jobs, found, home)

    emit(value, format, table)


# ---- logs -----------------------------------------------------------------------------------------------


def logs(parts: Parts, home: Home, reference: str, follow: bool, format: Format) -> int:
    """What happened to a job, and its curve, in order of time; with `follow` until it has finished."""
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        job = find_job(store, reference)
        if not follow:
            lines, _ = _lines(store, job.id, (0, -1))
            emit(lines, format, lambda out: _print_lines(out, lines))
        else:
            _follow(store, job.id, format)
        return exit_code([store.job(job.id)])


def _follow(store: Store, job: str, format: Format) -> None:
    """Print what comes until the job has finished; as JSON, one object a line."""
    seen, finished = (0, -1), False
    while not finished:
        finished = store.job(job).status.finished
        lines, seen = _lines(store, job, seen)
        if format is Format.json:
            print("".join(json.dumps(line) + "\n" for line in lines), end="", flush=True)
        elif lines:
            emit(lines, format, lambda out, lines=lines: _print_lines(out, lines))
        if not finished:
            time.sleep(FOLLOW_SECONDS)


def _lines(store: Store, job: str, seen: tuple[int, int]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Lines beyond the last event and the last step seen, and the new last ones."""
    events = [event for event in store.events(job) if event.id > seen[0]]
    points = store.metrics(job, seen[1])
    lines = [event_view(event) for event in events] + [metric_view(point) for point in points]
    last = (max((e.id for e in events), default=seen[0]), max((p.step for p in points), default=seen[1]))
    return sorted(lines, key=lambda line: line["at"]), last


def _print_lines(out: Console, lines: Iterable[dict[str, Any]]) -> None:
    for line in lines:
        words = _event_words(line) if line["type"] == "status" else _step_words(line)
        out.print(f"{moment(line['at'])} {words}", soft_wrap=True)


def _event_words(line: dict[str, Any]) -> str:
    message = f": {line['message']}" if line["message"] else ""
    return f"{line['status']} {line['reason_words']}{message}"


def _step_words(line: dict[str, Any]) -> str:
    names = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second")
    figures = [f"{name} {figure(line[name])}" for name in names if line[name] is not None]
    skipped = " (left out: its gradient was not finite)" if line["skipped"] else ""
    return f"step {line['step']} {', '.join(figures)}{skipped}"
