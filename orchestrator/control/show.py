"""What the controller shows of itself in the store, for commands that look: its hosts, the line of jobs.

Written when it changes, and now and then so that one sees that it lives: who changes a job asks a controller
that does. Nobody decides by it.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.control.fleet import Host
from orchestrator.control.work import Work
from orchestrator.scheduler import Decision, Snapshot
from orchestrator.store.store import Store

NAME = "controller"
SNAPSHOT = "snapshot"
PROGRESS = "progress"
SHOW_SECONDS = 1.0
"""No more often than this, however much changes."""
JOBS_A_SECOND = 500
"""A long line is written less often: it is text of some hundred bytes a job."""
ALIVE_SECONDS = 15.0
"""No more rarely than this."""
_SNAPSHOT = TypeAdapter(Snapshot)


class Board:
    def __init__(self, work: Work, home: Path) -> None:
        self._work = work
        self._who = {"process": os.getpid(), "machine": platform.node(), "home": str(home)}
        self._since = work.clock()
        self._shown: dict[str, Any] | None = None
        self._decided_on: Any = None
        self._at = 0.0
        self._progress: dict[str, Any] = {}
        self._progress_at = float("-inf")

    def show(self, snapshot: Snapshot, decision: Decision) -> None:
        """Hosts with who sits there, the jobs that wait, the first in line first, and what was decided on."""
        now = self._work.clock()
        if 0 <= now - self._at < max(SHOW_SECONDS, len(snapshot.waiting) / JOBS_A_SECOND):
            return
        names = {order.job.host_key: order.job.base.name for order in map(self._work.order, self._work.jobs)}
        value = self._value(
            [_host(host, names.get(host.base)) for host in self._work.fleet.hosts],
            [[job, reason.value] for job, reason in decision.refusals.items()],
        )
        aboard = [(host.name, [resident.job for resident in host.residents]) for host in snapshot.hosts]
        decided_on = (snapshot.capacity, aboard, [job.job for job in snapshot.waiting])
        if (value, decided_on) != (self._shown, self._decided_on) or now - self._at >= ALIVE_SECONDS:
            self._put(value, now)
            self._decided_on = decided_on
            self._work.store.boards.show(SNAPSHOT, _SNAPSHOT.dump_python(snapshot, mode="json"))

    def show_progress(self) -> None:
        """How far the tasks and searches under way are, job by job."""
        work, now = self._work, self._work.clock()
        work.progress = {key: value for key, value in work.progress.items() if key in work.flights}
        value = {
            work.flights[key].job: {"step": work.flights[key].step.kind, **asdict(progress)}
            for key, progress in work.progress.items()
        }
        if value != self._progress and (not value or not 0 <= now - self._progress_at < SHOW_SECONDS):
            work.store.boards.show(PROGRESS, value)
            self._progress, self._progress_at = value, now

    def clear(self) -> None:
        """The hosts are gone, and nothing is under way."""
        if self._progress:
            self._work.store.boards.show(PROGRESS, {})
            self._progress = {}
        self._put({**self._value([], []), "process": None}, self._work.clock())

    def _put(self, value: dict[str, Any], now: float) -> None:
        self._work.store.boards.show(NAME, value)
        self._shown, self._at = value, now

    def _value(self, hosts: list[dict[str, Any]], line: list[list[str]]) -> dict[str, Any]:
        return {**self._who, "since": self._since, "hosts": hosts, "line": line}


def works_elsewhere(store: Store, home: Path) -> bool:
    """Whether a controller lives that holds the lock of another home, or on another machine.

    One that was killed seems to live for twice the time within which it would have shown itself.
    """
    board = store.boards.read(NAME)
    if board is None or board.value["process"] is None or board.age > 2 * ALIVE_SECONDS:
        return False
    here = platform.node(), str(home.resolve())
    return (board.value["machine"], board.value.get("home")) != here


def read_snapshot(store: Store) -> tuple[Snapshot, float] | None:
    """The last snapshot that was shown, and when; None if there is none that this version can read."""
    board = store.boards.read(SNAPSHOT)
    try:
        return None if board is None else (_SNAPSHOT.validate_python(board.value), board.at)
    except ValueError:
        return None


def read_progress(store: Store) -> dict[str, dict[str, Any]]:
    """Job -> {"step": kind, "done", "total"} for those that are at something done one by one."""
    board = store.boards.read(PROGRESS)
    return dict(board.value) if board is not None else {}


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
        "saturated": host.saturated,
        "load_seconds": ready.load_seconds if ready else None,
    }
