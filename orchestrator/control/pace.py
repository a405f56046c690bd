"""How often the controller makes a round: at once while things happen, else for little of a core."""

from __future__ import annotations

from collections.abc import Callable

TICK_SECONDS = 0.1
CALM_SECONDS, CALM_AFTER = 0.5, 1.0
"""While hosts only step, rounds are made no more often; once nothing else has happened for so long."""
FOR_A_RESIDENT = 0.04
"""Seconds between them for each job that steps: a round reads and writes what it reports ..."""
LONGEST_CALM = 4.0
"""... but they are made so often, for a host that is lost is to be heard of within 5 s."""
LOOK_SECONDS = 0.5
"""How often it is looked meanwhile whether anybody wants anything."""


class Pace:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed_at = float("-inf")

    def changed(self) -> None:
        """Something happened but steps and the clock."""
        self._changed_at = self._clock()

    def pause(self, residents: int, awaited: bool) -> float:
        """Seconds to the next round. It costs the same whether a job reports one step or ten."""
        if awaited or self._clock() - self._changed_at < CALM_AFTER:
            return TICK_SECONDS
        return min(max(CALM_SECONDS, residents * FOR_A_RESIDENT), LONGEST_CALM)

    def rest(self, pause: float, wait: Callable[[float], None], wanted: Callable[[], bool]) -> None:
        """Wait so long, but for no longer than a look once somebody wants something."""
        while pause > LOOK_SECONDS:
            wait(LOOK_SECONDS)
            pause -= LOOK_SECONDS
            if wanted():
                return
        wait(pause)
