"""Training curves in the store: one row a step of a series, and what the registry has got of them.

A series is named by its train step, so equal work is one curve. A step done again after a resume
overwrites its row and keeps its `exported` mark: the registry never gets a point twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Table, and_, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator.store.engine import Part, patiently
from orchestrator.store.rows import Curves, MetricRow, ValidationRow
from orchestrator.store.tables import metrics, validations
from workers.types import StepDone, Validated


def finite(value: float) -> float | None:
    """SQL and JSON have no NaN that every reader agrees on: None stands for it."""
    return value if math.isfinite(value) else None


class CurveStore(Part):
    """Reads and writes `metrics` and `validations`."""

    @patiently
    def write(self, series: str, points: Sequence[StepDone | Validated], at: float) -> None:
        """Store points of one series in one transaction; a later one of the same step wins."""
        with self._writer.begin() as connection:
            write_points(connection, {series: points}, at)

    @patiently
    def read(self, series: str, after: int = -1) -> tuple[MetricRow, ...]:
        """Steps beyond `after`, in order, each with the evaluation loss measured at it, if any."""
        joined = metrics.outerjoin(
            validations,
            and_(metrics.c.series == validations.c.series, metrics.c.step == validations.c.step),
        )
        query = (
            select(*_step_columns(), validations.c.loss.label("eval_loss"))
            .select_from(joined)
            .where(metrics.c.series == series, metrics.c.step > after)
            .order_by(metrics.c.step)
        )
        with self._engine.connect() as connection:
            return tuple(MetricRow(*row) for row in connection.execute(query))

    @patiently
    def unexported(self, series: str, limit: int = 200) -> Curves:
        """The oldest points that the registry has not got."""
        steps = _pending(metrics, _step_columns(), series, limit)
        losses = _pending(validations, _validation_columns(), series, limit)
        with self._engine.connect() as connection:
            return Curves(
                tuple(MetricRow(*row) for row in connection.execute(steps)),
                tuple(ValidationRow(*row) for row in connection.execute(losses)),
            )

    @patiently
    def pending(self) -> frozenset[str]:
        """The series of which the registry lacks points."""
        with self._engine.connect() as connection:
            return frozenset(
                series
                for table in (metrics, validations)
                for series in connection.execute(
                    select(table.c.series).where(table.c.exported.is_(False)).distinct()
                ).scalars()
            )

    @patiently
    def mark_exported(self, series: str, curves: Curves) -> None:
        with self._writer.begin() as connection:
            _mark(connection, metrics, series, [row.step for row in curves.steps])
            _mark(connection, validations, series, [row.step for row in curves.validations])


def write_points(
    connection: Connection, points: Mapping[str, Sequence[StepDone | Validated]], at: float
) -> None:
    """Points by series, inside a transaction of the caller's."""
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    losses: dict[tuple[str, int], dict[str, Any]] = {}
    for series, found in points.items():
        for point in found:
            row = {
                "series": series,
                "step": point.step,
                "at": at,
                "exported": False,
                "attempt": point.attempt,
                "loss": finite(point.loss),
            }
            if isinstance(point, StepDone):
                row["grad_norm"] = finite(point.grad_norm)
                row["learning_rate"] = point.learning_rate
                row["tokens"] = point.tokens
                row["seconds"] = point.seconds
                row["skipped"] = point.skipped
                steps[series, point.step] = row
            else:
                losses[series, point.step] = row
    # In one order everywhere, so that two writers cannot wait for each other.
    _upsert(connection, metrics, [steps[key] for key in sorted(steps)])
    _upsert(connection, validations, [losses[key] for key in sorted(losses)])


def _step_columns() -> list[Any]:
    """In the order of `MetricRow`."""
    return [metrics.c[field.name] for field in fields(MetricRow) if field.name in metrics.c]


def _validation_columns() -> list[Any]:
    return [validations.c[field.name] for field in fields(ValidationRow)]


def _upsert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert the rows; one whose step is there keeps when it came first, and whether it was exported."""
    if not rows:
        return
    # The one statement that the two databases spell alike and SQLAlchemy keeps apart.
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    fresh = insert(table)
    kept = ("series", "step", "at", "exported")
    changes = {column.name: column for column in fresh.excluded if column.name not in kept}
    connection.execute(fresh.on_conflict_do_update(index_elements=["series", "step"], set_=changes), rows)


def _pending(table: Table, columns: Sequence[Any], series: str, limit: int) -> Any:
    condition = and_(table.c.series == series, table.c.exported.is_(False))
    return select(*columns).where(condition).order_by(table.c.step).limit(limit)


def _mark(connection: Connection, table: Table, series: str, steps: list[int]) -> None:
    if steps:
        # A row at a time: SQLAlchemy takes longer to write down a list of them than SQLite to look one up.
        condition = and_(table.c.series == series, table.c.step == bindparam("found"))
        connection.execute(
            update(table).where(condition).values(exported=True), [{"found": step} for step in steps]
        )
