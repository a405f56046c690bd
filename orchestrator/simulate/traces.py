"""Traces of jobs as others published them: Philly, Gavel, Tiresias. One reader for each, told by its columns.

Times are seconds from the first submission, sizes are ranks (GPUs). What a trace does not tell stays unknown:
each job is its own base, as nothing says that two could have shared one.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from orchestrator.policy import DEFAULT_TEAM
from workers.types import BadInput

GAVEL_COLUMNS = 7
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class TraceJob:
    job: str
    submitted_at: float
    seconds: float
    """How long it runs alone on its ranks. The policy is never shown it."""
    ranks: int
    team: str = DEFAULT_TEAM
    priority: int = 0
    base: str = ""
    """Jobs of one base may share its hosts; empty: a base of its own."""
    slots: int = 1
    tick: float = 1.0
    """How long its tick lasts alone, against others of its base."""


def read_trace(path: Path, steps_per_second: float | None = None) -> tuple[TraceJob, ...]:
    """The jobs of a trace file in the order of submission. Raises BadInput that names file and row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise BadInput(
            f"{path} is not text: give a Philly, Gavel or Tiresias trace, or a home folder"
        ) from None
    if not lines:
        raise BadInput(f"{path} is empty: a trace has a job on each line")
    header = next(csv.reader(lines[:1]))
    for columns, read in _READERS.items():
        if set(columns) <= set(header):
            rows = csv.DictReader(lines)
            return in_time(_rows(path, rows, read, first=2))
    if len(lines[0].split("\t")) == GAVEL_COLUMNS:
        if steps_per_second is None:
            raise BadInput(f"{path} tells steps, not seconds: say how many a second with --steps-per-second")
        rows = (line.split("\t") for line in lines)
        return in_time(_rows(path, rows, lambda row, name: _gavel(row, name, steps_per_second), first=1))
    known = "; ".join(", ".join(columns) for columns in _READERS)
    raise BadInput(
        f"{path} is no trace that is known: its first line must name {known}; or be a row of Gavel's"
    )


def in_time(jobs: Iterable[TraceJob]) -> tuple[TraceJob, ...]:
    """In the order of submission, the first one at 0."""
    ordered = sorted(jobs, key=lambda job: (job.submitted_at, job.job))
    start = ordered[0].submitted_at if ordered else 0.0
    return tuple(replace(job, submitted_at=job.submitted_at - start) for job in ordered)


def _rows(
    path: Path, rows: Iterable[Row], read: Callable[[Row, str], TraceJob], first: int
) -> list[TraceJob]:
    found: list[TraceJob] = []
    for number, row in enumerate(rows, first):
        try:
            job = read(row, f"job-{number - first:06}")
            _check(job)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise BadInput(f"{path}, line {number}: {error}") from None
        found.append(job)
    if not found:
        raise BadInput(f"{path} has no job")
    return found


def _check(job: TraceJob) -> None:
    """Raises ValueError."""
    if not math.isfinite(job.submitted_at):
        raise ValueError("the time of submission is not a number")
    if not (math.isfinite(job.seconds) and job.seconds >= 0):
        raise ValueError(f"it runs {job.seconds} seconds: write 0 or more")
    if job.ranks < 1:
        raise ValueError(f"it needs {job.ranks} GPUs: write 1 or more")


def _philly(row: dict[str, str], name: str) -> TraceJob:
    submitted = datetime.fromisoformat(row["timestamp"]).timestamp()
    return TraceJob(name, submitted, float(row["duration"]), int(row["num_gpus"]), row["cluster"])


def _tiresias(row: dict[str, str], name: str) -> TraceJob:
    return TraceJob(name, float(row["submit_time"]), float(row["duration"]), int(row["num_gpu"]))


def _gavel(row: Sequence[str], name: str, steps_per_second: float) -> TraceJob:
    if len(row) != GAVEL_COLUMNS:
        raise ValueError(f"it has {len(row)} columns, not {GAVEL_COLUMNS}")
    return TraceJob(name, float(row[5]), int(row[4]) / steps_per_second, int(row[6]))


_READERS: dict[tuple[str, ...], Callable[[dict[str, str], str], TraceJob]] = {
    ("timestamp", "duration", "num_gpus", "cluster"): _philly,
    ("job_id", "num_gpu", "submit_time", "duration"): _tiresias,
}
