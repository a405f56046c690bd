"""Weighted fair share between teams, with quotas that can be borrowed and reclaimed. Pure arithmetic.

A team's share is what it holds plus what it has lately held, over its weight. What it holds counts from the
moment of admission, so a burst of submissions cannot outrun accounting (the entry penalty of Kueue's
admission fair sharing); what it held counts half after every `half_life` (Slurm's decayed usage). A team
within its quota stands before all that borrow, and only those that borrow can be made to give back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from orchestrator.policy import Policy

Share: TypeAlias = tuple[int, float]
"""(0 within its quota, 1 beyond; ranks over weight). The lower one goes first."""

_ROUNDING = 1e-9


class Shares:
    """What each team holds on the scratch copy of the cluster; charged and refunded as places are given."""

    def __init__(self, policy: Policy, usage: Mapping[str, float]) -> None:
        self._policy = policy
        self._past = {team: past_ranks(seconds, policy.half_life) for team, seconds in usage.items()}
        self._held: dict[str, float] = {}
        self._ranked: dict[str, tuple[Share, str]] = {}
        """Team -> its share, with its name; as long as no charge has changed it."""
        self._givers: dict[tuple[str, float, bool], set[str]] = {}
        """What `givers` found, as long as no charge has changed it."""
        self.changes = 0
        """Charges so far: while there is none, every share is as it was."""

    def charge(self, team: str, ranks: float) -> None:
        self.charge_each((team,), ranks)

    def charge_each(self, teams: Iterable[str], ranks: float) -> None:
        """So many ranks more for each; a team may be among them several times."""
        self.changes += 1
        self._givers.clear()
        held, ranked = self._held, self._ranked
        for team in teams:
            ranked.pop(team, None)
            held[team] = held.get(team, 0.0) + ranks

    def held(self, team: str) -> float:
        """Ranks it holds now."""
        return self._held.get(team, 0.0)

    def share(self, team: str, more: float = 0.0) -> Share:
        """A team's share if it held `more` ranks than it does."""
        return self._share(team, more) if more else self._rank(team)[0]

    def lowest(self, teams: Iterable[str]) -> str:
        """The team that goes first; of equals the first by name."""
        return min(self._ranks(teams))[1]

    def _ranks(self, teams: Iterable[str]) -> list[tuple[Share, str]]:
        known = self._ranked
        return [known.get(team) or self._rank(team) for team in teams]

    def _rank(self, team: str) -> tuple[Share, str]:
        if (known := self._ranked.get(team)) is None:
            known = self._ranked[team] = self._share(team, 0.0), team
        return known

    def _share(self, team: str, more: float) -> Share:
        claim = self._policy.team(team)
        ranks = self.held(team) + more
        beyond = ranks - claim.quota
        past = self._past.get(team, 0.0)
        if beyond <= _ROUNDING:
            return 0, (past + ranks) / claim.weight
        return 1, (max(past - claim.quota, 0.0) + beyond) / claim.weight

    def may_reclaim(self, taker: str, ranks: float, giver: str, *, aged: bool = False) -> bool:
        """Whether a job of `taker` may have a resident of `giver` preempted.

        Kueue's rule (fair sharing, LessThanInitialShare): the giver borrows, and the taker's share after
        admission is below the giver's before it gives. Every such exchange lowers the sorted list of shares,
        so no chain of them comes back to where it began. A job that has waited to the bound is compared
        without what it asks for: else one larger than its team's share would wait for ever.
        """
        return _gives(self.share(giver), self.share(taker, 0.0 if aged else ranks))

    def givers(self, taker: str, ranks: float, *, aged: bool = False) -> set[str]:
        """All teams that hold ranks and may be made to give some to a job of `taker`: see `may_reclaim`."""
        key = taker, ranks, aged
        if (known := self._givers.get(key)) is None:
            taken = self.share(taker, 0.0 if aged else ranks)
            ranked = self._ranks(self._held)
            known = {team for share, team in ranked if team != taker and _gives(share, taken)}
            self._givers[key] = known
        return known


def _gives(giver: Share, taker: Share) -> bool:
    """Whether a team borrows, and stands above what the other would have."""
    return giver[0] == 1 and (taker[0] == 0 or taker[1] < giver[1] - _ROUNDING)


def past_ranks(usage: float, half_life: float) -> float:
    """Decayed rank-seconds as ranks: what a team that always held so many would show."""
    return usage * math.log(2) / half_life


def decayed(usage: Mapping[str, float], seconds: float, half_life: float) -> dict[str, float]:
    """Every team's usage `seconds` later."""
    factor = 0.5 ** (max(seconds, 0.0) / half_life)
    return {team: value * factor for team, value in usage.items() if value * factor > _ROUNDING}


def grown(
    usage: Mapping[str, float], held: Mapping[str, float], seconds: float, half_life: float
) -> dict[str, float]:
    """Usage after `seconds` more in which each team held so many ranks. A clock set back counts nothing."""
    past = decayed(usage, seconds, half_life)
    rate = half_life / math.log(2) * (1 - 0.5 ** (max(seconds, 0.0) / half_life))
    for team, ranks in held.items():
        past[team] = past.get(team, 0.0) + ranks * rate
    return past


def jain(shares: Iterable[float]) -> float:
    """Jain's index (Jain, Chiu, Hawe 1984): 1 when all are equal, 1/n when one has all."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0 else 1.0
