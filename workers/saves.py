"""Checkpoints and adapters on their way to disk, and to an object store, off the tick's path.

What is to be written is copied to host memory between two ticks. One thread of rank 0 writes, fsyncs and
renames it, in the order of asking; the event that tells of it goes out once it is durable. Every rank holds
the same list of what is under way, so that all of them hear of an end, or of a failure, in the same tick.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import takewhile

from workers.disk import Problem, written
from workers.hang import round_seconds
from workers.ranks import Ranks
from workers.types import CheckpointSaved, TrainingFinished

Told = CheckpointSaved | TrainingFinished


@dataclass(frozen=True)
class Save:
    event: Told
    """What is told when it is durable."""
    outcome: Future[Problem | None] | None
    """None on the ranks that do not write."""


class Saves:
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, "saves") if ranks.rank == 0 else None
        self._under_way: deque[Save] = deque()

    @property
    def under_way(self) -> bool:
        return bool(self._under_way)

    def of(self, job: str) -> bool:
        """Whether anything of `job` is under way."""
        return any(save.event.job == job for save in self._under_way)

    def behind(self, job: str, step: int) -> bool:
        """Whether what is under way of `job` is of a step before that one."""
        return any(save.event.job == job and save.event.step < step for save in self._under_way)

    def begin(self, event: Told, write: Callable[[], object]) -> None:
        """Let rank 0's thread `write` what no tick will change; `event` is told afterwards."""
        outcome = self._thread.submit(written, write) if self._thread else None
        self._under_way.append(Save(event, outcome))

    def ended(
        self, wait_for: Callable[[Told], bool] = lambda _: False, seconds: float = math.inf
    ) -> list[tuple[Told, Problem | None]]:
        """What has ended, in order, with what kept it from being durable; waits for all that `wait_for`
        picks, at most so long.

        Collective if anything is under way. After a failure nothing more of the same attempt is told.
        """
        told: list[tuple[Told, Problem | None]] = []
        until, waits = time.monotonic() + seconds, True
        while self._under_way and waits:
            found = self._outcomes(wait_for, until) if self._ranks.rank == 0 else None
            outcomes, waits = self._ranks.broadcast(found)
            told += self._take(outcomes)
        return told

    def _take(self, outcomes: list[Problem | None]) -> list[tuple[Told, Problem | None]]:
        """What is told of the first saves under way, which have ended so."""
        ended = [(self._under_way.popleft().event, problem) for problem in outcomes]
        told: list[tuple[Told, Problem | None]] = []
        failed: set[tuple[str, int]] = set()
        for event, problem in ended:
            attempt = (event.job, event.attempt)
            if attempt not in failed:
                told.append((event, problem))
            if problem:
                failed.add(attempt)
        self._under_way = deque(s for s in self._under_way if (s.event.job, s.event.attempt) not in failed)
        return told

    def _outcomes(self, wait_for: Callable[[Told], bool], until: float) -> tuple[list[Problem | None], bool]:
        """Of the first saves under way, as far as they are done, and whether more are waited for.

        Rank 0 alone knows. It waits for a round.
        """
        least = max((n for n, save in enumerate(self._under_way, 1) if wait_for(save.event)), default=0)
        asked = [save.outcome for save in self._under_way if save.outcome is not None]
        wait(asked[:least], max(0.0, min(round_seconds(), until - time.monotonic())))
        outcomes = [outcome.result() for outcome in takewhile(Future.done, asked)]
        return outcomes, len(outcomes) < least and time.monotonic() < until

    def close(self) -> None:
        """Returns when the thread has written all it was given."""
        if self._thread:
            self._thread.shutdown()
