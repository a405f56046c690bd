"""Who is the controller of a store: each that begins gets a number above all before it, its epoch."""

from __future__ import annotations

from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError

from orchestrator.store import tables
from orchestrator.store.engine import Part, patiently

_NEWEST = select(func.max(tables.controllers.c.epoch))


class EpochStore(Part):
    """Writes and reads `controllers`."""

    def begin(self, who: str) -> int:
        """Be the controller from now on.

        The number is also above those of a store that was here before this one, which hosts may remember: it
        is the time, in seconds, where that is higher.
        """
        while True:
            try:
                return self._begin(who)
            except IntegrityError:
                continue  # another process took the same number: look again

    @patiently
    def _begin(self, who: str) -> int:
        now = self._clock()
        with self._writer.begin() as db:
            epoch = max(int(now), (db.execute(_NEWEST).scalar() or 0) + 1)
            db.execute(insert(tables.controllers), {"epoch": epoch, "who": who, "at": now})
        return epoch

    @patiently
    def newest(self) -> int:
        """0 before the first controller."""
        with self._engine.connect() as db:
            return db.execute(_NEWEST).scalar() or 0
