"""Who has to leave so that a waiting job can go first. Pure; takes from the scratch copy what it decides.

Preemption is a pause at a step: the job is saved, frees its slot, and its host keeps the base. A job preempts
residents of its own team that stand below it, and those of other teams by `Shares.may_reclaim` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from orchestrator.host_view import HostView, Resident
from orchestrator.placement import Room
from orchestrator.policy import Policy
from orchestrator.queue import Standing, Waiting, level, standing

Worst: TypeAlias = tuple[Standing, float, str]
"""The larger, the sooner it has to leave: its standing, then the younger."""

ABOVE_ALL: Standing = (-1, 0, 0)

Seat: TypeAlias = tuple[Worst, str, Resident]
"""A resident, with the name of its host."""


class Asks(NamedTuple):
    """A waiting job as it asks for others' places."""

    job: Waiting
    standing: Standing

    @property
    def aged(self) -> bool:
        return self.standing[0] == 0


class Preemption:
    """Chooses victims. `preempted` has every job told to leave so far, and for whom."""

    def __init__(self, room: Room, policy: Policy, now: float) -> None:
        self._room = room
        self._policy = policy
        self._now = now
        self.preempted: dict[str, str] = {}
        self._of_team: dict[str, list[tuple[Worst, str]]] | None = None
        self._ranks: dict[tuple[str, str], list[Seat]] = {}
        self._lowest: dict[tuple[str, str], Standing] = {}
        self._emptied: set[str] = set()
        """Hosts that someone leaves by this decision."""

    def slot_for(self, job: Waiting) -> bool:
        """Whether somebody leaves a slot of the job's base for it: of all that may be made to, the worst."""
        if self._enough():
            return False
        asks, seated = self._asks(job), self._room.census.worst.get(job.base, {})
        # A resident of a full host holds the least that the job could ask for.
        givers = self._room.shares.givers(job.team, job.world_size / max(job.slots, 1), aged=asks.aged)
        teams = [team for team in (job.team, *givers) if team in seated]
        found = [seat for team in teams if (seat := self._worst_seat(job.base, team, asks)) is not None]
        if not found:
            return False
        (_, _, victim), host = max(found)
        self._preempt(self._room.hosts[host], job, [victim])
        return True

    def _worst_seat(self, base: str, team: str, asks: Asks) -> tuple[Worst, str] | None:
        """The worst of a team's residents on hosts of a base that may be made to leave; its host."""
        own = team == asks.job.team
        if own and self._worst_standing(base, team) <= asks.standing:
            return None  # It is asked of most jobs, and answered without an order.
        for worst, host, resident in reversed(self._ranked(base, team)):
            if own and worst[0] <= asks.standing:
                return None  # Those that come after stand no worse.
            if self._leaves(resident, host, asks):
                return worst, host
        return None

    def _leaves(self, resident: Resident, name: str, asks: Asks) -> bool:
        """Whether a resident may be made to leave a host, from which one leaves at a time."""
        if name in self._emptied:
            return False
        host = self._room.hosts[name]
        gives = self._gives(resident, asks, host.world_size / len(host.residents))
        return gives and self._room.may_share(host, asks.job)

    def _ranked(self, base: str, team: str) -> list[Seat]:
        """A team's residents on hosts of a base that nobody was leaving before, the worst last."""
        if (known := self._ranks.get((base, team))) is None:
            seats = [
                (self._worst(resident), host.name, resident)
                for host in self._room.hosts_of(base)
                if host.name not in self._room.census.leaving
                for resident in host.residents
                if resident.team == team
            ]
            seats.sort(key=itemgetter(0, 1))
            known = self._ranks[base, team] = seats
        return known

    def _worst_standing(self, base: str, team: str) -> Standing:
        """The worst that any of a team's residents on hosts of a base can have that may be preempted."""
        if (known := self._lowest.get((base, team))) is None:
            _, resident = self._room.census.worst[base][team]
            known = self._lowest[base, team] = self._standing(resident)
        return known

    def ranks_for(self, job: Waiting, missing: int) -> bool:
        """Whether whole hosts are left by all their residents, `missing` ranks or more, for the job."""
        if self._enough():
            return False
        asks = self._asks(job)
        chosen: list[HostView] = []
        for host in self._candidates(asks):
            if missing <= 0:
                break
            if all(self._gives(resident, asks, job.world_size) for resident in host.residents):
                chosen.append(host)
                missing -= host.world_size
                self._room.shares.charge(host.residents[0].team, -host.world_size)
        for host in chosen:
            self._room.shares.charge(host.residents[0].team, host.world_size)
        if missing > 0:
            return False
        for host in _needed(chosen, -missing):
            self._preempt(host, job, [resident.job for resident in host.residents])
        return True

    def _enough(self) -> bool:
        return len(self.preempted) >= self._policy.most_preempted

    def _asks(self, job: Waiting) -> Asks:
        return Asks(job, standing(job, self._policy, self._now))

    def _gives(self, resident: Resident, asks: Asks, ranks: float) -> bool:
        """Whether a resident may be made to leave for a job."""
        if resident.leaving or self.protected(resident):
            return False
        if resident.team == asks.job.team:
            return asks.standing < self._standing(resident)
        return self._room.shares.may_reclaim(asks.job.team, ranks, resident.team, aged=asks.aged)

    def protected(self, resident: Resident) -> bool:
        """At most one preemption of a job in `protection` seconds; none of one seated a moment ago."""
        if resident.job in self._room.seated:
            return True
        before = resident.preempted_at
        return before is not None and self._now - before < self._policy.protection

    def _preempt(self, host: HostView, job: Waiting, victims: list[str]) -> None:
        self.preempted |= dict.fromkeys(victims, job.job)
        self._emptied.add(host.name)
        self._room.release(host.name, victims)

    # ---- candidates ------------------------------------------------------------------------------------

    def _candidates(self, asks: Asks) -> Iterator[HostView]:
        """Hosts that could give way, the worst of a team first: other teams' by falling share, then its own.

        A job that has waited to the bound takes from its own team first: what the team gives up lowers the
        share that others are compared with.
        """
        by_team = self._index()
        shares = self._room.shares
        mine = asks.job.team
        others = sorted((t for t in by_team if t != mine), key=lambda t: (shares.share(t), t), reverse=True)
        for team in [mine, *others] if asks.aged else [*others, mine]:
            yield from self._hosts_of_team(team, asks)

    def _hosts_of_team(self, team: str, asks: Asks) -> Iterator[HostView]:
        for _, name in reversed(self._index().get(team, [])):
            host = self._room.hosts.get(name)
            if host is None or host.visitors or not host.residents or host.emptying:
                continue
            if not self._gives(host.residents[0], asks, asks.job.world_size):
                if not host.residents[0].leaving:
                    return  # Those that come after stand no worse.
                continue
            yield host

    def _index(self) -> dict[str, list[tuple[Worst, str]]]:
        """Hosts by the team of their first resident, worst last; those with a protected resident left out."""
        if self._of_team is None:
            self._of_team = {}
            for host in self._room.hosts.values():
                if host.residents and not any(r.leaving or self.protected(r) for r in host.residents):
                    first = host.residents[0]
                    self._of_team.setdefault(first.team, []).append((self._worst(first), host.name))
            for hosts in self._of_team.values():
                hosts.sort()
        return self._of_team

    def _standing(self, resident: Resident) -> Standing:
        return 1, -resident.priority, level(resident.attained, resident.remaining, self._policy)

    def _worst(self, resident: Resident) -> Worst:
        return self._standing(resident), resident.submitted_at, resident.job


def _needed(chosen: list[HostView], surplus: int) -> list[HostView]:
    """Without those whose ranks are not missed: the first were the worst, so the last are spared first."""
    kept: list[HostView] = []
    for host in reversed(chosen):
        if host.world_size <= surplus:
            surplus -= host.world_size
        else:
            kept.append(host)
    return kept
