"""How many tokens a tick should hold: the knee of its speed, found on real ticks. Pure.

Tokens per second grow with the tokens of a tick while launches and gathers are paid for by few of them, and
stay level once the arithmetic takes all the time. The budget climbs a ladder of doubling rungs; the knee is
the smallest rung that reached `KNEE` of the best speed seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KNEE = 0.9
"""The budget is the smallest one within this share of the best speed: larger ticks only make jobs wait."""
RUNGS = tuple(512 << doubling for doubling in range(9))
"""512 to 131,072 tokens."""
WARM_TICKS = 2
"""First ticks of a rung that are not counted: new shapes allocate memory and choose kernels."""
COUNTED_TICKS = 5
LONGEST_SECONDS = 10.0
"""No rung is tried whose ticks would take longer: commands wait for the end of a tick."""
LEVEL = 1.05
"""A rung that is not so many times faster than the best before it is level; two in a row end the search."""


@dataclass(frozen=True)
class Knee:
    """The search so far. It waits at a rung for as long as the jobs have too few tokens to fill it."""

    rung: int = 0
    ticks: int = 0
    """Ticks that filled the rung."""
    speeds: tuple[float, ...] = ()
    """Tokens a second of the counted ones."""
    measured: tuple[tuple[int, float], ...] = ()
    """(budget, tokens a second) of the rungs below."""
    settled: int | None = None

    @property
    def budget(self) -> int:
        """Padded tokens a tick should hold now."""
        return self.settled or RUNGS[self.rung]

    @property
    def half(self) -> int | None:
        """Padded tokens with which a tick has half of the best speed; None unless the search has found it.

        A tick of N tokens takes fixed + each * N seconds, so its speed is the best times N / (N + half), with
        half = fixed / each. Both are taken from the line through the first rung and the last.
        """
        if self.settled is None or len(self.measured) < 2:
            return None
        (few, slower), (many, faster) = self.measured[0], self.measured[-1]
        shorter, longer = few / slower, many / faster
        if longer <= shorter:
            return None
        return max(0, round(shorter * (many - few) / (longer - shorter) - few))

    def fills(self, tokens: int) -> bool:
        """Whether a tick of so many tokens tells anything of the rung."""
        return self.settled is None and tokens >= 0.75 * self.budget

    def seen(self, tokens: int, seconds: float) -> Knee:
        """After a tick of `tokens` padded tokens a rank that took `seconds`."""
        if not self.fills(tokens):
            return self
        if tokens > 1.5 * self.budget and self.rung + 1 < len(RUNGS):
            return self._climb()  # chunks larger than the rung: it is none
        ticks = self.ticks + 1
        if ticks <= WARM_TICKS:
            return replace(self, ticks=ticks)
        speeds = (*self.speeds, tokens / max(seconds, 1e-9))
        if len(speeds) < COUNTED_TICKS:
            return replace(self, ticks=ticks, speeds=speeds)
        # The fastest: whatever disturbs a tick only makes it slower.
        return self._measured((self.budget, max(speeds)))

    def _measured(self, found: tuple[int, float]) -> Knee:
        measured = (*self.measured, found)
        too_long = 2 * self.budget / found[1] > LONGEST_SECONDS
        if too_long or _level(measured) or self.rung + 1 == len(RUNGS):
            best = max(speed for _, speed in measured)
            knee = next(budget for budget, speed in measured if speed >= KNEE * best)
            return replace(self, measured=measured, settled=knee)
        return replace(self, measured=measured)._climb()

    def _climb(self) -> Knee:
        return replace(self, rung=self.rung + 1, ticks=0, speeds=())


def _level(measured: tuple[tuple[int, float], ...]) -> bool:
    """Whether the last two rungs brought nothing over the best before them."""
    if len(measured) < 3:
        return False
    before = max(speed for _, speed in measured[:-2])
    return max(speed for _, speed in measured[-2:]) < LEVEL * before
