"""What the controller shows of itself in the store, for commands that look: its hosts, the line of jobs.

Written when it changes, and now and then so that one sees that it lives. Nobody decides by it.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from orchestrator.control.fleet import Host
from orchestrator.control.work import Work
from orchestrator.scheduler import Decision

NAME = "controller"
SHOW_SECONDS = 1.0
"""No more often than this, however much changes."""
ALIVE_SECONDS = 15.0


class Board:
    def __init__(self, work: Work) -> None:
        self._work = work
        self._since = work.clock()
        self._shown: dict[str, Any] | None = None
        self._at = 0.0

    def show(self, decision: Decision) -> None:
        """Hosts with who sits there, and the jobs that wait, the first in line first."""
        now = self._work.clock()
        if 0 <= now - self._at < SHOW_SECONDS:
            return
        names = {order.job.host_key: order.job.base.name for order in map(self._work.order, self._work.jobs)}
        value = self._value(
            [_host(host, names.get(host.base)) for host in self._work.fleet.hosts],
            [[job, reason.value] for job, reason in decision.refusals.items()],
        )
        if value != self._shown or now - self._at >= ALIVE_SECONDS:
            self._put(value, now)

    def clear(self) -> None:
        """The hosts are gone."""
        self._put(self._value([], []), self._work.clock())

    def _put(self, value: dict[str, Any], now: float) -> None:
        self._work.store.show(NAME, value)
        self._shown, self._at = value, now

    def _value(self, hosts: list[dict[str, Any]], line: list[list[str]]) -> dict[str, Any]:
        where = {"process": os.getpid(), "machine": platform.node(), "since": self._since}
        return {**where, "hosts": hosts, "line": line}


def _host(host: Host, base: str | None) -> dict[str, Any]:
    measured, ready = host.measured, host.ready
    return {
        "name": host.name,
        "base": base or "",
        "world_size": host.world_size,
        "zero": ready.zero if ready else None,
        "state": "ready" if ready else "loading",
        "slots": host.slots,
        "residents": sorted(host.residents),
        "visitors": sorted(host.visitors),
        "adapter_parameters": sum(host.adapter_parameters.values()),
        "adapter_room": measured.adapter_parameters if measured else None,
        "tokens_per_tick": measured.tokens_per_tick if measured else None,
        "load_seconds": ready.load_seconds if ready else None,
    }
