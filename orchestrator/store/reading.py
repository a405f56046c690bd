"""Rows out of SQL: queries that several methods of the store share, inside a transaction of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from orchestrator.job import Reason, Status, run_status
from orchestrator.store import tables
from orchestrator.store.rows import EventRow, JobRow, RunRow

HEAVY = ("recipe", "plan")
"""Columns of a job that never change and that nobody should read ten times a second."""
NEWEST_RUN = (tables.runs.c.submitted_at.desc(), tables.runs.c.number.desc())
"""The order of runs."""
MOST_PARAMETERS = 500
"""Values in one IN (...): SQLite takes 32,766, and a longer list is slower than two queries."""


def read_runs(db: Connection, condition: Any = None) -> tuple[RunRow, ...]:
    """Runs with their statuses, the newest first."""
    query = select(tables.runs).order_by(*NEWEST_RUN)
    pairs = select(tables.jobs.c.run, tables.jobs.c.status)
    if condition is not None:
        query = query.where(condition)
        pairs = pairs.join(tables.runs, tables.jobs.c.run == tables.runs.c.id).where(condition)
    rows = db.execute(query).mappings().all()
    statuses: dict[str, list[Status]] = {}
    for run, status in db.execute(pairs):
        statuses.setdefault(run, []).append(Status(status))
    return tuple(run_row(row, statuses.get(row["id"], [])) for row in rows)


def run_row(row: RowMapping, statuses: list[Status]) -> RunRow:
    values = {name: value for name, value in row.items() if name != "number"}
    return RunRow(**values, status=run_status(statuses))


def heavy_columns(db: Connection, jobs: list[str]) -> dict[str, dict[str, Any]]:
    columns = [tables.jobs.c.id, *(tables.jobs.c[name] for name in HEAVY)]
    rows = [
        row
        for some in portions(set(jobs))
        for row in db.execute(select(*columns).where(tables.jobs.c.id.in_(some))).mappings()
    ]
    return {row["id"]: {name: row[name] for name in HEAVY} for row in rows}


def heavy_of(job: JobRow) -> dict[str, Any]:
    return {name: getattr(job, name) for name in HEAVY}


def job_row(row: RowMapping, more: Mapping[str, Any] | None = None) -> JobRow:
    values = {name: value for name, value in row.items() if name != "position"} | dict(more or {})
    values["depends_on"] = tuple(values["depends_on"])
    values["status"] = Status(values["status"])
    values["reason"] = Reason(values["reason"])
    return JobRow(**values)


def event_row(row: RowMapping) -> EventRow:
    before = Status(row["before"]) if row["before"] else None
    values: dict[str, Any] = {
        "before": before,
        "after": Status(row["after"]),
        "reason": Reason(row["reason"]),
    }
    return EventRow(**(dict(row) | values))


def portions(keys: Set[str]) -> list[list[str]]:
    ordered = sorted(keys)
    return [ordered[first : first + MOST_PARAMETERS] for first in range(0, len(ordered), MOST_PARAMETERS)]
