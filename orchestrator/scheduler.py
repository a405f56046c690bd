"""`schedule(Snapshot) -> Decision`: who starts now, where, and why the others wait. Pure and deterministic.

Policy: priority, then age. A job goes to a warm host of its base; a host is opened when its base has none and
all its ranks fit. Once a job has to wait for room, jobs after it open no host: that room stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.contracts import Capacity
from orchestrator.job import Reason
from orchestrator.placement import HostView, NewHost, Place, Room
from orchestrator.queue import Need, Waiting, in_order, parents_verdict


@dataclass(frozen=True)
class Snapshot:
    """All that the decision depends on."""

    capacity: Capacity
    """Free now, the hosts' own ranks not counted."""
    hosts: tuple[HostView, ...]
    waiting: tuple[Waiting, ...]
    running_tasks: int = 0
    bases_to_come: frozenset[str] = frozenset()
    """Bases that some unfinished job still needs: their idle hosts stay warm unless another needs room."""
    next_host: int = 1
    """Number in the name of the next new host."""


@dataclass(frozen=True)
class Decision:
    """What to do. A waiting job is in exactly one of placements, tasks, free and refusals."""

    start_hosts: tuple[NewHost, ...]
    placements: dict[str, str]
    """Job -> host, which may be one of `start_hosts`."""
    start_tasks: tuple[str, ...]
    free: tuple[str, ...]
    """Jobs whose next step needs no resource."""
    refusals: dict[str, Reason]
    close_hosts: tuple[str, ...]


def schedule(snapshot: Snapshot) -> Decision:
    room = Room(snapshot.capacity, snapshot.hosts, snapshot.running_tasks, snapshot.next_host)
    placements: dict[str, str] = {}
    tasks: list[str] = []
    free: list[str] = []
    refusals: dict[str, Reason] = {}
    head_waits_for_room = False
    for job in in_order(snapshot.waiting):
        place = parents_verdict(job) or room.place(job, may_open=not head_waits_for_room)
        if isinstance(place, Place):
            if place.host is not None:
                placements[job.job] = place.host
            else:
                (tasks if job.need is Need.CPU else free).append(job.job)
        else:
            refusals[job.job] = place
            head_waits_for_room |= place is Reason.WAITS_FOR_HOST
    room.close_idle(keep=snapshot.bases_to_come)
    return Decision(tuple(room.opened), placements, tuple(tasks), tuple(free), refusals, tuple(room.closed))
