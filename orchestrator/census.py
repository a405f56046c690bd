"""Everybody on the hosts when a decision begins, in one pass: of a large cluster the longest one. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

from orchestrator.host_view import HostView, Resident

WorstByTeam: TypeAlias = dict[str, tuple[tuple[int, float], Resident]]
"""Team -> one of its residents, with (-priority, service)."""


class Census:
    """Who holds what, and who of each team has most to give."""

    def __init__(self, hosts: Iterable[HostView], spared_since: float) -> None:
        """`spared_since`: residents preempted later than that are not preempted again."""
        self.held: dict[str, float] = defaultdict(float)
        """Team -> ranks. A resident that stays holds an equal part of its host's."""
        self.leaving: dict[str, int] = defaultdict(int)
        """Host -> residents that are leaving it, where there are any."""
        self.worst: dict[str, WorstByTeam] = defaultdict(dict)
        """Base -> team -> of those who stay and are not spared, one of the lowest priority, and of these the
        one with the most service: none that may be preempted stands worse."""
        for host in hosts:
            if host.residents:
                self._count(host, spared_since)

    def _count(self, host: HostView, spared_since: float) -> None:
        # Ten thousands pass here in a decision: each is looked at once, and for no more than is needed.
        held, worst = self.held, self.worst[host.base]
        part = host.world_size / len(host.residents)
        for resident in host.residents:
            if resident.leaving:
                self.leaving[host.name] += 1
                continue
            team, before = resident.team, resident.preempted_at
            held[team] += part
            if before is not None and before > spared_since:
                continue
            service = resident.attained if resident.remaining is None else resident.remaining
            key = -resident.priority, service
            if (worse := worst.get(team)) is None or worse[0] < key:
                worst[team] = key, resident
