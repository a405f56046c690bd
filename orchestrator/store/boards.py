"""What a controller puts up for commands that only look, by name. Nobody decides by it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, select, update

from orchestrator.store import tables
from orchestrator.store.engine import Part, patiently
from orchestrator.store.rows import Board


class BoardStore(Part):
    """Writes and reads `boards`."""

    @patiently
    def show(self, name: str, value: Any) -> None:
        """Put something up; it takes the place of what was there."""
        row = {"value": value, "at": self._clock()}
        with self._writer.begin() as db:
            changed = db.execute(update(tables.boards).where(tables.boards.c.name == name).values(**row))
            if changed.rowcount == 0:
                db.execute(insert(tables.boards), {"name": name, **row})

    @patiently
    def read(self, name: str) -> Board | None:
        """None if nothing of that name was ever put up."""
        query = select(tables.boards.c.value, tables.boards.c.at).where(tables.boards.c.name == name)
        with self._engine.connect() as db:
            row = db.execute(query).first()
        return Board(row.value, row.at, self._clock() - row.at) if row is not None else None
