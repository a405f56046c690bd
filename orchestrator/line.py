"""The line of all who wait for a place on a host: the lowest share first, and its first job. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable

from orchestrator.fairness import Shares
from orchestrator.job import Reason
from orchestrator.policy import Policy
from orchestrator.queue import Need, Waiting, by_team


class Line:
    """Gives one job after another."""

    def __init__(
        self,
        jobs: Iterable[Waiting],
        policy: Policy,
        now: float,
        passed: dict[str, Reason] | None = None,
    ) -> None:
        """`passed` takes the jobs that are not given, as they would be turned away: see `close`."""
        self._passed: dict[str, Reason] = {} if passed is None else passed
        self._teams = by_team(jobs, policy, now)
        """The first job last."""
        for waiting in self._teams.values():
            waiting.reverse()
        self._closed: dict[str, set[str]] = {team: set() for team in self._teams}
        """Team -> bases of which its jobs get no slot any more."""
        self._team = ""
        self._changes = -1

    def next(self, shares: Shares) -> Waiting | None:
        """The first job of the team with the lowest share; None when nobody is left."""
        while self._teams:
            if self._changes != shares.changes or self._team not in self._teams:
                self._team = shares.lowest(self._teams)
                self._changes = shares.changes
            waiting, closed = self._teams[self._team], self._closed[self._team]
            # Ten thousand pass here in a decision: looked up once.
            slot, passed, why = Need.SLOT, self._passed, Reason.WAITS_FOR_SLOT
            while waiting:
                job = waiting.pop()
                if job.base not in closed or job.need is not slot or job.parents:
                    return job
                passed[job.job] = why
            del self._teams[self._team]
        return None

    def close(self, team: str, base: str) -> None:
        """Pass all of a team who want a slot of a base: one before them was turned away."""
        self._closed[team].add(base)

    def drop(self, team: str, keep: Container[str]) -> list[str]:
        """Take a team's jobs out of the line; their ids. Those with parents, or of a base in `keep`, stay."""
        waiting = self._teams.pop(team, [])
        stay = [job for job in waiting if job.base in keep or job.parents]
        gone = [job.job for job in reversed(waiting) if not (job.base in keep or job.parents)]
        if stay:
            self._teams[team] = stay
        return gone
