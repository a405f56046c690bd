"""Everybody on the hosts when a decision begins, in one pass: of a large cluster the longest one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from orchestrator.host_view import HostView, Resident

WorstByTeam: TypeAlias = dict[str, tuple[tuple[int, float], Resident]]
"""Team -> one of its residents, with (-priority, service)."""


class Census:
    """Who holds what, and who of each team has most to give."""

    def __init__(self, hosts: Iterable[HostView], spared_since: float) -> None:
        """`spared_since`: residents preempted later than that are not preempted again."""
        self.held: dict[str, float] = {}
        """Team -> ranks. A resident that stays holds an equal part of its host's."""
        self.leaving: dict[str, int] = {}
        """Host -> residents that are leaving it, where there are any."""
        self.worst: dict[str, WorstByTeam] = {}
        """Base -> team -> of those who are not spared, on hosts that nobody is leaving, one of the lowest
        priority, and of these the one with the most service: none stands worse."""
        self._spared_since = spared_since
        for host in hosts:
            if host.residents:
                self._count(host)

    def _count(self, host: HostView) -> None:
        part = host.world_size / len(host.residents)
        if leaving := sum([resident.leaving for resident in host.residents]):
            self.leaving[host.name] = leaving
            for resident in host.residents:
                if not resident.leaving:
                    self.held[resident.team] = self.held.get(resident.team, 0.0) + part
        else:
            self._count_all(host.residents, part, self.worst.setdefault(host.base, {}))

    def _count_all(self, residents: tuple[Resident, ...], part: float, worst: WorstByTeam) -> None:
        # Ten thousands pass here in a decision: each is looked at once, and for no more than is needed.
        held, spared = self.held, self._spared_since
        for resident in residents:
            team, before = resident.team, resident.preempted_at
            held[team] = held.get(team, 0.0) + part
            if before is not None and before > spared:
                continue
            service = resident.attained if resident.remaining is None else resident.remaining
            key = -resident.priority, service
            if (worse := worst.get(team)) is None or worse[0] < key:
                worst[team] = key, resident
