"""Why a job waits, who is ahead of it, and what would have to be freed. Pure.

It asks the same order and the same decision as `schedule`, on the snapshot that the decision was made on.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.job import REASONS, Reason
from orchestrator.placement import HostView
from orchestrator.queue import Need, Waiting, in_order
from orchestrator.scheduler import Decision, Snapshot

ROOM = frozenset({Reason.WAITS_FOR_HOST, Reason.WAITS_FOR_SLOT, Reason.WAITS_FOR_MEMORY})
"""Refusals that end when somebody leaves."""


@dataclass(frozen=True)
class Explanation:
    job: str
    sentence: str
    """Why it waits, or where it goes; for a person."""
    reason: Reason | None
    """None when it does not wait."""
    ahead: tuple[str, ...]
    """Jobs that go first and want what it wants, the first one first."""
    to_free: tuple[str, ...]
    """What would have to be free, each in words."""
    expected_start: float | None
    """Seconds since the epoch; None when it is not known."""
    expected_end: float | None


def explain(snapshot: Snapshot, decision: Decision, job: str) -> Explanation:
    """Raises KeyError for a job that is not waiting in `snapshot`."""
    found = {each.job: each for each in snapshot.waiting}[job]
    reason = decision.refusals.get(job)
    if reason is None:
        host = decision.placements.get(job)
        return Explanation(job, f"It starts{f' on {host}' if host else ''} now.", None, (), (), None, None)
    ahead = _ahead(snapshot, decision, found) if reason in ROOM else ()
    to_free = _to_free(snapshot, found) if reason in ROOM else ()
    words = f"It {REASONS[reason].words}"
    if reason in ROOM:
        words += f"; {len(ahead)} {'job goes' if len(ahead) == 1 else 'jobs go'} first"
    return Explanation(job, f"{words}.", reason, ahead, to_free, None, None)


def _ahead(snapshot: Snapshot, decision: Decision, job: Waiting) -> tuple[str, ...]:
    """Those who come before it in the line and wait for room as it does."""
    before: list[str] = []
    hosts = _of_base(snapshot, job)
    for other in in_order(snapshot.waiting):
        if other.job == job.job:
            return tuple(before)
        if decision.refusals.get(other.job) in ROOM and (other.base == job.base or not hosts):
            before.append(other.job)
    return tuple(before)


def _to_free(snapshot: Snapshot, job: Waiting) -> tuple[str, ...]:
    hosts = _of_base(snapshot, job)
    if hosts and job.need is Need.SLOT:
        return tuple(f"a slot of {host.name}: {_aboard(host)}" for host in hosts)
    capacity = snapshot.capacity
    on_gpus = capacity.gpus > 0 or any(host.on_gpus for host in snapshot.hosts)
    free = int(capacity.gpus if on_gpus else capacity.cpus)
    held = [f"{host.name} ({host.world_size} ranks): {_aboard(host)}" for host in snapshot.hosts]
    return (f"{job.world_size} ranks, of which {free} are free", *held)


def _of_base(snapshot: Snapshot, job: Waiting) -> list[HostView]:
    return [host for host in snapshot.hosts if host.base == job.base]


def _aboard(host: HostView) -> str:
    return ", ".join(sorted(host.residents | host.visitors)) or "nobody"
