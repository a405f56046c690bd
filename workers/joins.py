"""Jobs on their way onto a host: their rows are encoded beside the tick, and they join once that is done.

Small data is encoded at once, between two ticks: that takes less than to hand it over. Larger data goes to
`workers.encoder`, and a thread asks the object store, if the job has one. Every rank holds the same list of
what is under way, so that a job becomes resident, or is stopped, on all ranks between the same two ticks.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from workers import checkpoint, mirror
from workers.disk import Problem
from workers.encoded import size_of
from workers.encoder import Encoder
from workers.ranks import Ranks
from workers.types import CheckpointsAway, JobSpec

AT_ONCE = 32 * 1024
"""Bytes of data that are encoded between two ticks: some 20 ms of short rows."""


@dataclass(frozen=True)
class Prepared:
    """What a job begins with: the checkpoint it goes on from, and the file of its rows in tokens, if any."""

    checkpoint: Path | None = None
    rows: Path | None = None


Outcome = tuple[Prepared, Problem | None]


@dataclass(frozen=True)
class Join:
    spec: JobSpec
    rows: Path
    """Where rank 0 has them put."""
    outcome: Future[Outcome] | None
    """None on all ranks but the first."""


class Joins:
    def __init__(self, ranks: Ranks, base: str) -> None:
        """`base` is the folder of the tokenizer."""
        self._ranks = ranks
        self._encoder = Encoder(base)
        self._thread = ThreadPoolExecutor(1, "joins") if ranks.rank == 0 else None
        self._under_way: dict[str, Join] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def attempt(self, job: str) -> int | None:
        """The attempt of `job` that is under way."""
        join = self._under_way.get(job)
        return join.spec.attempt if join else None

    def begin(self, spec: JobSpec) -> Prepared | None:
        """Begin to prepare a job; what there is to prepare if it can join at once. Collective."""
        at_once = None
        if self._ranks.rank == 0 and size_of(spec) <= AT_ONCE and not spec.checkpoint_url:
            at_once = Prepared(checkpoint.newest(Path(spec.checkpoint_dir)))
        if prepared := self._ranks.broadcast(at_once):
            return prepared
        # Named as scratch is, so that a killed host's is removed with it.
        rows = Path(spec.checkpoint_dir) / f".rows.{uuid4().hex}" / "rows.safetensors"
        outcome = self._thread.submit(self._prepare, spec, rows) if self._thread else None
        self._under_way[spec.job] = Join(spec, rows, outcome)
        return None

    def drop(self, job: str) -> None:
        """Give up a job that is under way."""
        join = self._under_way.pop(job)
        if join.outcome is None:
            return
        if not join.outcome.cancel():
            self._encoder.cancel(join.rows)
            join.outcome.add_done_callback(lambda _: remove(join.rows))

    def ended(self, seconds: float = 0.0) -> list[tuple[JobSpec, Outcome]]:
        """Jobs that are prepared, in the order of asking; waits so long for those that are not.

        Collective if any is under way.
        """
        if not self._under_way:
            return []
        found = self._outcomes(seconds) if self._ranks.rank == 0 else None
        outcomes: dict[str, Outcome] = self._ranks.broadcast(found)
        return [(self._under_way.pop(job).spec, outcome) for job, outcome in outcomes.items()]

    def _outcomes(self, seconds: float) -> dict[str, Outcome]:
        asked = {job: join.outcome for job, join in self._under_way.items() if join.outcome}
        wait(asked.values(), seconds)
        return {job: outcome.result() for job, outcome in asked.items() if outcome.done()}

    def _prepare(self, spec: JobSpec, rows: Path) -> Outcome:
        try:
            newest = mirror.newest(spec)
            if size_of(spec) <= AT_ONCE:
                return Prepared(newest), None
            return Prepared(newest, rows), self._encoder.encode(spec, rows)
        except CheckpointsAway as error:
            return Prepared(), ("checkpoints_away", f"cannot look for its newest checkpoint: {error}")
        except OSError as error:
            return Prepared(), ("internal_error", f"its rows cannot be encoded: {error}")

    def close(self) -> None:
        """Gives up what is under way."""
        for job in list(self._under_way):
            self.drop(job)
        if self._thread:
            self._thread.shutdown()
        self._encoder.close()


def remove(rows: Path) -> None:
    """Remove the file of a job's rows, once all ranks have read it."""
    shutil.rmtree(rows.parent, ignore_errors=True)
