"""Our own event log as a trace: what the jobs of a home's store took, ready to be scheduled once more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from orchestrator.control.submission import read_order
from orchestrator.job import Status
from orchestrator.policy import DEFAULT_TEAM
from orchestrator.simulate.traces import TraceJob, in_time
from orchestrator.store.rows import EventRow
from orchestrator.store.store import Store

HELD = (Status.STARTING, Status.RUNNING)


def read_events(store: Store) -> tuple[TraceJob, ...]:
    """The jobs of a store that have ended and that ran. One that shared its host counts as long as it did."""
    found: list[TraceJob] = []
    for job in store.jobs():
        seconds = held_seconds(store.events(job.id))
        if job.status.finished and seconds > 0:
            planned = read_order(job.plan).job
            team = planned.team or DEFAULT_TEAM
            size, base, slots = planned.world_size, planned.host_key, planned.base.slots
            found.append(TraceJob(job.id, job.submitted_at, seconds, size, team, job.priority, base, slots))
    return in_time(found)


def held_seconds(events: Sequence[EventRow]) -> float:
    """How long a job was on a host, over all its attempts."""
    return sum(
        then.at - event.at for event, then in pairwise(events) if event.after in HELD and then.at > event.at
    )
