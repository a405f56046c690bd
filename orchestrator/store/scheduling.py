"""What the policy remembers, as one JSON value. Read once by a controller, written over by the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, insert, select, update

from orchestrator.store import tables
from orchestrator.store.engine import patiently


class SchedulingStore:
    """One row. Its writer is the controller that runs the store's jobs."""

    def __init__(self, engine: Engine, patience: float) -> None:
        self.patience = patience
        self._engine = engine
        self._writer = engine.execution_options(**{tables.WRITES: True})

    @patiently
    def read(self) -> dict[str, Any] | None:
        """None before the first write."""
        with self._engine.connect() as db:
            row = db.execute(select(tables.scheduling.c.value)).first()
        return None if row is None else dict(row[0])

    @patiently
    def write(self, value: Mapping[str, Any]) -> None:
        row = {"value": dict(value)}
        with self._writer.begin() as db:
            if db.execute(update(tables.scheduling).values(row)).rowcount == 0:
                db.execute(insert(tables.scheduling), {"id": 1, **row})
