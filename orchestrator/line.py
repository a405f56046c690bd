"""The line of all who wait for a place on a host: the lowest share first, and its first job. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable
from typing import TypeAlias

from orchestrator.fairness import Shares
from orchestrator.policy import Policy
from orchestrator.queue import Waiting, order_key

_Entry: TypeAlias = tuple[tuple[int, int, int, float, str], Waiting]


class Line:
    """Gives one job after another. Only as much of it is sorted as is asked for."""

    def __init__(self, jobs: Iterable[Waiting], policy: Policy, now: float) -> None:
        self._teams: dict[str, list[_Entry]] = {}
        for job in jobs:
            self._teams.setdefault(job.team, []).append((order_key(job, policy, now), job))
        for entries in self._teams.values():
            heapq.heapify(entries)

    def next(self, shares: Shares) -> Waiting | None:
        """The first job of the team with the lowest share; None when nobody is left."""
        if not self._teams:
            return None
        team = min(self._teams, key=lambda team: (shares.share(team), team))
        entries = self._teams[team]
        job = heapq.heappop(entries)[1]
        if not entries:
            del self._teams[team]
        return job

    def drop(self, team: str, keep: Container[str]) -> list[str]:
        """Take a team's jobs out of the line; their ids. Those with parents, or of a base in `keep`, stay."""
        entries = self._teams.pop(team, [])
        stay = [entry for entry in entries if entry[1].base in keep or entry[1].parents]
        gone = [entry[1].job for entry in sorted(entries) if not (entry[1].base in keep or entry[1].parents)]
        if stay:
            heapq.heapify(stay)
            self._teams[team] = stay
        return gone
