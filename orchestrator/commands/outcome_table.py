"""The last words of a run: what was trained, how it scores, where the release lies, how to look at it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.api import errors
from orchestrator.api.outcome import Made, Outcome, Score
from orchestrator.api.service import Value
from orchestrator.commands.output import figure, grid
from orchestrator.job import Reason, Status

SCORE_COLUMNS = ("task", "metric", "base", "adapter", "fused", "retention")


def show_outcome(out: Console, jobs: Sequence[Value], found: Outcome, folder_flag: str | None) -> None:
    """Print what the jobs have made so far. `folder_flag` as in `Service`."""
    made = {version.job: version for version in found.versions}
    out.print()
    for job in jobs:
        out.print(_made_line(job, made.get(job["name"])), soft_wrap=True)
    if found.scores:
        out.print()
        out.print(score_table(found.scores))
    out.print()
    for release in found.releases:
        kind = "merged model" if release.merged else "adapter"
        out.print(f"release: {kind} {release.name} in {_near(release.out_dir)}", soft_wrap=True)
    if found.versions and folder_flag is not None:
        out.print(f"to open MLflow: {_command()} ui{folder_flag}", soft_wrap=True)


def score_table(scores: Sequence[Score]) -> Table:
    """A row a metric; without a fusion its two columns are left out."""
    columns = SCORE_COLUMNS if any(score.fused is not None for score in scores) else SCORE_COLUMNS[:4]
    return grid(columns, [row[: len(columns)] for row in _score_rows(scores)], right=columns[2:])


def _score_rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    return [
        (
            score.task,
            score.metric,
            figure(score.base),
            figure(score.adapter),
            figure(score.fused),
            percent(score.retention),
        )
        for score in scores
    ]


def percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.0%}" if math.isfinite(share) else "-"


def exit_code(jobs: Iterable[Value]) -> int:
    """Of a run's jobs. Those that failed only because another did, or was cancelled, do not count."""
    statuses = {Status(job["status"]) for job in jobs if job["reason"] != Reason.PARENT_FAILED}
    if any(not status.finished for status in statuses):
        return errors.UNFINISHED
    if Status.FAILED in statuses:
        return errors.FAILED
    return errors.CANCELLED if Status.CANCELLED in statuses else errors.OK


def _made_line(job: Value, made: Made | None) -> str:
    what = f"{job['name']}: {job['about']}"
    if made is None:
        return f"{what}, {job['status']}"
    champion = ", champion" if made.champion else ""
    return f"{what} -> {made.name}/{made.version}{champion}"


def _near(folder: str) -> str:
    """As one would type it from here, if that is shorter."""
    relative = os.path.relpath(folder)
    return relative if len(relative) < len(folder) else folder


def _command() -> str:
    """`chorus`, or where it lies when it is not on the path."""
    on_path = any((Path(part) / "chorus").is_file() for part in os.get_exec_path())
    beside = Path(".venv/bin/chorus")
    return "chorus" if on_path or not beside.is_file() else str(beside)
