"""What the policy remembers, as one JSON value. Read once by a controller, written over by the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert, select, update

from orchestrator.store import tables
from orchestrator.store.engine import Part, patiently


class SchedulingStore(Part):
    """One row. Its writer is the controller that runs the store's jobs."""

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
