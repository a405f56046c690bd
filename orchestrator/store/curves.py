"""Training curves in the store: one row a step of a series, and what the registry has got of them.

A series is named by its train step, so equal work is one curve. A step done again after a resume
overwrites its row and keeps its `exported` mark: the registry never gets a point twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Table, and_, bindparam, insert, select, update

from orchestrator.store.rows import Curves, MetricRow, ValidationRow
from orchestrator.store.tables import WRITES, metrics, validations
from workers.types import StepDone, Validated


def finite(value: float) -> float | None:
    """SQL and JSON have no NaN that every reader agrees on: None stands for it."""
    return value if math.isfinite(value) else None


class CurveStore:
    """Reads and writes `metrics` and `validations`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})

    def write(self, series: str, points: Sequence[StepDone | Validated], at: float) -> None:
        """Store points of one series in one transaction; a later one of the same step wins."""
        steps = {point.step: _step_values(point) for point in points if isinstance(point, StepDone)}
        losses = {
            point.step: {"loss": finite(point.loss), "attempt": point.attempt}
            for point in points
            if isinstance(point, Validated)
        }
        with self._writer.begin() as connection:
            _upsert(connection, metrics, series, steps, at)
            _upsert(connection, validations, series, losses, at)

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
            return tuple(MetricRow(**row) for row in connection.execute(query).mappings())

    def unexported(self, series: str, limit: int = 200) -> Curves:
        """The oldest points that the registry has not got."""
        steps = _pending(metrics, _step_columns(), series, limit)
        losses = _pending(validations, _validation_columns(), series, limit)
        with self._engine.connect() as connection:
            return Curves(
                tuple(MetricRow(**row) for row in connection.execute(steps).mappings()),
                tuple(ValidationRow(**row) for row in connection.execute(losses).mappings()),
            )

    def mark_exported(self, series: str, curves: Curves) -> None:
        with self._writer.begin() as connection:
            _mark(connection, metrics, series, [row.step for row in curves.steps])
            _mark(connection, validations, series, [row.step for row in curves.validations])


def _step_columns() -> list[Any]:
    return [column for column in metrics.c if column.name not in ("series", "exported")]


def _validation_columns() -> list[Any]:
    return [column for column in validations.c if column.name not in ("series", "exported")]


def _step_values(point: StepDone) -> dict[str, Any]:
    return {
        "attempt": point.attempt,
        "loss": finite(point.loss),
        "grad_norm": finite(point.grad_norm),
        "learning_rate": point.learning_rate,
        "tokens": point.tokens,
        "seconds": point.seconds,
        "skipped": point.skipped,
    }


def _upsert(
    connection: Connection, table: Table, series: str, values: dict[int, dict[str, Any]], at: float
) -> None:
    """Update the steps that are there, insert the others. The keys are few: one poll's worth of steps."""
    query = select(table.c.step).where(table.c.series == series, table.c.step.in_(values))
    known = set(connection.execute(query).scalars())
    fresh = [
        {"series": series, "step": step, "at": at, "exported": False, **row}
        for step, row in values.items()
        if step not in known
    ]
    again = [{"key": step, **row} for step, row in values.items() if step in known]
    if fresh:
        connection.execute(insert(table), fresh)
    if again:
        row = and_(table.c.series == series, table.c.step == bindparam("key"))
        connection.execute(update(table).where(row), again)


def _pending(table: Table, columns: Sequence[Any], series: str, limit: int) -> Any:
    condition = and_(table.c.series == series, table.c.exported.is_(False))
    return select(*columns).where(condition).order_by(table.c.step).limit(limit)


def _mark(connection: Connection, table: Table, series: str, steps: list[int]) -> None:
    if steps:
        condition = and_(table.c.series == series, table.c.step.in_(steps))
        connection.execute(update(table).where(condition).values(exported=True))
