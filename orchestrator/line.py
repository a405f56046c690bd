"""The line of all who wait for a place on a host: the lowest share first, and its first job. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable

from orchestrator.fairness import Shares
from orchestrator.policy import Policy
from orchestrator.queue import Waiting, order_key


class Line:
    """Gives one job after another."""

    def __init__(self, jobs: Iterable[Waiting], policy: Policy, now: float) -> None:
        self._teams: dict[str, list[Waiting]] = {}
        """The first job last."""
        for job in jobs:
            self._teams.setdefault(job.team, []).append(job)
        for waiting in self._teams.values():
            waiting.sort(key=lambda job: order_key(job, policy, now), reverse=True)
        self._team = ""
        self._changes = -1

    def next(self, shares: Shares) -> Waiting | None:
        """The first job of the team with the lowest share; None when nobody is left."""
        if not self._teams:
            return None
        if self._changes != shares.changes or self._team not in self._teams:
            self._team = min(self._teams, key=lambda team: (shares.share(team), team))
            self._changes = shares.changes
        waiting = self._teams[self._team]
        job = waiting.pop()
        if not waiting:
            del self._teams[self._team]
        return job

    def drop(self, team: str, keep: Container[str]) -> list[str]:
        """Take a team's jobs out of the line; their ids. Those with parents, or of a base in `keep`, stay."""
        waiting = self._teams.pop(team, [])
        stay = [job for job in waiting if job.base in keep or job.parents]
        gone = [job.job for job in reversed(waiting) if not (job.base in keep or job.parents)]
        if stay:
            self._teams[team] = stay
        return gone
