"""Finished steps, by content id: work that is done is done for every job that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, insert, select

from orchestrator.store import tables
from orchestrator.store.engine import Part, patiently
from orchestrator.store.reading import portions
from orchestrator.store.rows import StepRow


class StepStore(Part):
    """Writes and reads `steps`."""

    @patiently
    def finish(self, step: str, kind: str, job: str, result: Mapping[str, Any]) -> None:
        """Record a step as done. A second record of the same step changes nothing: the first one stands."""
        row = {"id": step, "kind": kind, "job": job, "result": dict(result), "finished_at": self._clock()}
        with self._writer.begin() as db:
            query = select(tables.steps.c.id).where(tables.steps.c.id == step)
            if db.execute(query).first() is None:
                db.execute(insert(tables.steps), row)

    @patiently
    def forget(self, step: str) -> None:
        """Take a step's record back because what it made is gone: it will be done again."""
        with self._writer.begin() as db:
            db.execute(delete(tables.steps).where(tables.steps.c.id == step))

    @patiently
    def finished(self, steps: set[str]) -> set[str]:
        """Those among `steps` that are finished. Their results, which may be long, are not read."""
        query, found = select(tables.steps.c.id), tables.steps.c.id
        with self._engine.connect() as db:
            return {
                step
                for some in portions(steps)
                for step in db.execute(query.where(found.in_(some))).scalars()
            }

    @patiently
    def read(self, steps: set[str] | None = None) -> dict[str, StepRow]:
        """Finished steps by id: those among `steps`, or all."""
        query, found = select(tables.steps), tables.steps.c.id
        with self._engine.connect() as db:
            if steps is None:
                rows = list(db.execute(query).mappings())
            else:
                rows = [
                    row
                    for some in portions(steps)
                    for row in db.execute(query.where(found.in_(some))).mappings()
                ]
        return {row["id"]: StepRow(**row) for row in rows}
