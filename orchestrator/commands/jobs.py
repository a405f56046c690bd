"""`ps`, `status`, `logs`: what is submitted, and how it goes, whether or not anybody works."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from orchestrator.api.outcome import read_outcome
from orchestrator.api.service import Service, Value
from orchestrator.commands.outcome_table import exit_code, show_outcome
from orchestrator.commands.output import Format, duration, emit, figure, grid, moment
from orchestrator.job import FINISHED

FOLLOW_SECONDS = 0.5
JOB_COLUMNS = (*("job", "team", "status", "#", "host", "step", "loss", "tokens/s", "time", "left", "why"),)
FIGURES = ("#", "step", "loss", "tokens/s", "time", "left")

# ---- ps and status --------------------------------------------------------------------------------------


def ps(service: Service, everything: bool, format: Format) -> None:
    """Jobs that are not finished and those of the newest run, or all."""
    jobs = service.jobs(everything)
    emit(jobs, format, lambda out: _print_jobs(out, jobs, service))


def _print_jobs(out: Console, jobs: Sequence[Value], service: Service) -> None:
    if not jobs:
        out.print(f"no jobs in {service.place}; `chorus run FILE` submits some", soft_wrap=True)
        return
    out.print(grid(JOB_COLUMNS, [_cells(job) for job in jobs], right=FIGURES))
    if any(job["finished_at"] is None for job in jobs) and not service.at_work():
        out.print(
            "nobody works here; `chorus serve`, or the same `chorus run FILE`, goes on with the unfinished",
            soft_wrap=True,
        )


def _cells(job: Mapping[str, Any]) -> tuple[str, ...]:
    training = job["status"] == "RUNNING" and job["seconds_left"] is not None
    return (
        *(job["id"], job["team"], job["status"], str(job["position"] or ""), job["host"] or ""),
        _step(job),
        figure(job["loss"]),
        f"{job['tokens_per_second']:,.0f}" if training and job["tokens_per_second"] else "",
        duration(_running_time(job)),
        duration(job["seconds_left"]),
        f"{job['reason_words']}: {job['message']}" if job["message"] else job["reason_words"],
    )


def _step(job: Mapping[str, Any]) -> str:
    """Of a training; or what is done one by one, and how far that is."""
    if progress := job.get("progress"):
        return f"{progress['step']} {progress['done']}/{progress['total']}"
    return f"{job['step']}/{job['num_steps']}" if job["num_steps"] else ""


def _running_time(job: Mapping[str, Any]) -> float | None:
    if job["started_at"] is None:
        return None
    return (job["finished_at"] or time.time()) - job["started_at"]


def status(service: Service, reference: str, format: Format) -> int:
    """One job or one run in full; the exit code tells its state."""
    value = service.status(reference)
    if "jobs" not in value:
        emit(value, format, lambda out: _print_job(out, value))
        return exit_code([value])
    emit(value, format, lambda out: _print_run(out, value, service))
    return exit_code(value["jobs"])


def _print_job(out: Console, job: Value) -> None:
    out.print(grid(JOB_COLUMNS, [_cells(job)], right=FIGURES))
    out.print()
    done = [(step["words"], "yes" if step["done"] else "") for step in job["steps"]]
    out.print(grid(("step", "done"), done))
    out.print()
    _print_lines(out, job["events"])


def _print_run(out: Console, run: Value, service: Service) -> None:
    out.print(f"{run['id']} {run['status']}, submitted {moment(run['submitted_at'])}")
    _print_jobs(out, run["jobs"], service)
    show_outcome(out, run["jobs"], read_outcome(run["outcome"]), service.folder_flag)


# ---- logs -----------------------------------------------------------------------------------------------


def logs(service: Service, reference: str, follow: bool, format: Format) -> int:
    """What happened to a job, and its curve, in order of time; with `follow` until it has finished."""
    found = service.lines(reference)
    if not follow:
        emit(found["lines"], format, lambda out: _print_lines(out, found["lines"]))
        return exit_code([found["job"]])
    return exit_code([_follow(service, found, format)])


def _follow(service: Service, found: Value, format: Format) -> Value:
    """Print what comes until the job has finished; as JSON, one object a line. The job as it is then."""
    while True:
        lines = found["lines"]
        if format is Format.json:
            print("".join(json.dumps(line) + "\n" for line in lines), end="", flush=True)
        elif lines:
            emit(lines, format, lambda out, lines=lines: _print_lines(out, lines))
        if found["job"]["status"] in FINISHED:
            return found["job"]
        time.sleep(FOLLOW_SECONDS)
        first, second = found["seen"]
        found = service.lines(found["job"]["id"], (first, second))


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
