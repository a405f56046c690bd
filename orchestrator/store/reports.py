"""What hosts report, written down: curves and progress, for attempts that are under way."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, func, select, update

from orchestrator.store import tables
from orchestrator.store.curves import write_points
from orchestrator.store.reading import portions
from orchestrator.store.rows import Report


def write_reports(db: Connection, reports: Sequence[Report], at: float) -> None:
    """Inside a transaction of the caller's; those of stale attempts are dropped."""
    present = _attempts(db, {report.job for report in reports})
    heard = [report for report in reports if present.get(report.job) == report.attempt]
    write_points(db, {report.series: report.points for report in heard}, at)
    _write_progress(db, heard)


def _attempts(db: Connection, jobs: set[str]) -> dict[str, int]:
    query = select(tables.jobs.c.id, tables.jobs.c.attempt)
    # Locked, in one order, so that no attempt can end before its reports are written.
    rows = [
        row
        for some in portions(jobs)
        for row in db.execute(
            query.where(tables.jobs.c.id.in_(some)).order_by(tables.jobs.c.id).with_for_update()
        )
    ]
    return {row.id: row.attempt for row in rows}


def _write_progress(db: Connection, reports: Sequence[Report]) -> None:
    """What a report does not say stays as it is."""
    names = ("step", "num_steps", "loss", "tokens_per_second")
    rows = [
        {"key": report.job, **{f"new_{name}": getattr(report.progress, name) for name in names}}
        for report in reports
        if report.progress is not None
    ]
    if rows:
        columns = tables.jobs.c
        values = {
            name: func.coalesce(bindparam(f"new_{name}", type_=columns[name].type), columns[name])
            for name in names
        }
        db.execute(update(tables.jobs).where(columns.id == bindparam("key")).values(**values), rows)
