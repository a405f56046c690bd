"""Why a job waits, who is ahead of it, what would have to be freed, and when it may start. Pure.

It asks the same order, shares and room as `schedule`, on the snapshot that the decision was made on.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.fairness import Shares
from orchestrator.host_view import HostView
from orchestrator.job import REASONS, Reason
from orchestrator.line import Line
from orchestrator.placement import Room
from orchestrator.queue import Need, Waiting, aged
from orchestrator.scheduler import Decision, Snapshot

ROOM = frozenset({Reason.WAITS_FOR_HOST, Reason.WAITS_FOR_SLOT, Reason.WAITS_FOR_MEMORY, Reason.WAITS_APART})
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
    """What would have to be free, each in words: `4 ranks; 1 is free`, `a slot of host-2: a, b`."""
    expected_start: float | None
    """Seconds since the epoch; None when it depends on jobs of which the time of a step is not known."""
    expected_end: float | None


def explain(snapshot: Snapshot, decision: Decision, job: str) -> Explanation:
    """Raises KeyError for a job that is not waiting in `snapshot`."""
    found = {each.job: each for each in snapshot.waiting}[job]
    room = Room(
        snapshot.capacity,
        snapshot.hosts,
        snapshot.running_tasks,
        snapshot.next_host,
        Shares(snapshot.policy, snapshot.usage),
        snapshot.poison.suspects,
    )
    reason = decision.refusals.get(job)
    ahead = _ahead(snapshot, decision, found, room) if reason in ROOM else ()
    to_free = _to_free(found, room) if reason in ROOM else ()
    start = snapshot.now if reason is None else _start(snapshot, found, room, ahead, reason)
    end = None
    if start is not None and found.remaining is not None:
        end = start + found.remaining / max(found.world_size, 1)
    sentence = _sentence(snapshot, decision, found, room, reason, len(ahead))
    return Explanation(job, sentence, reason, ahead, to_free, start, end)


def _sentence(
    snapshot: Snapshot, decision: Decision, job: Waiting, room: Room, reason: Reason | None, ahead: int
) -> str:
    if reason is None:
        host = decision.placements.get(job.job)
        return f"It starts on {host} now." if host else "It starts now."
    words = f"It {REASONS[reason].words}".removesuffix(".")
    if reason not in ROOM:
        return f"{words}."
    victims = sorted(victim for victim, taker in decision.preempt.items() if taker == job.job)
    if victims:
        return f"{words}; {_listed(victims)} was told to make way for it."
    held, others = (
        room.shares.held(job.team),
        sum(r.team != job.team for h in snapshot.hosts for r in h.residents),
    )
    words += f"; {ahead} {'job goes' if ahead == 1 else 'jobs go'} first"
    if others:
        words += f", and its team {job.team} holds {held:g} of {room.all_ranks} ranks"
    if aged(job, snapshot.policy, snapshot.now):
        words += "; it has waited to the bound, and what gets free is kept for it"
    return f"{words}."


def _ahead(snapshot: Snapshot, decision: Decision, job: Waiting, room: Room) -> tuple[str, ...]:
    """Those who come before it in the line and wait for room as it does."""
    line = Line(
        (w for w in snapshot.waiting if w.need in (Need.SLOT, Need.HOST)), snapshot.policy, snapshot.now
    )
    found: list[str] = []
    while (other := line.next(room.shares)) is not None and other.job != job.job:
        wants_the_same = other.base == job.base or not room.of_base.get(job.base)
        if decision.refusals.get(other.job) in ROOM and wants_the_same:
            found.append(other.job)
    return tuple(found)


def _to_free(job: Waiting, room: Room) -> tuple[str, ...]:
    hosts = sorted(room.hosts_of(job.base), key=lambda host: host.name)
    if hosts and job.need is Need.SLOT:
        return tuple(f"a slot of {host.name}: {_listed([r.job for r in host.residents])}" for host in hosts)
    held = [
        f"{host.name} ({host.world_size} ranks): {_listed([r.job for r in host.residents])}"
        for host in sorted(room.hosts.values(), key=lambda host: host.name)
        if host.residents
    ]
    free = room.free_ranks + room.idle_ranks
    return (f"{job.world_size} ranks, of which {max(free, 0)} are free", *held[:8])


def _start(
    snapshot: Snapshot, job: Waiting, room: Room, ahead: tuple[str, ...], reason: Reason
) -> float | None:
    """When enough of what runs has ended for those ahead and for it, if nobody new comes."""
    if reason not in ROOM:
        return None
    hosts = room.hosts_of(job.base)
    by_id = {each.job: each for each in snapshot.waiting}
    if hosts and job.need is Need.SLOT:
        return _nth([_ends(snapshot.now, host) for host in hosts], 1 + len(ahead))
    wanted = job.world_size + sum(by_id[other].world_size for other in ahead)
    wanted -= room.free_ranks + room.idle_ranks
    ends: list[list[float | None]] = []
    for host in snapshot.hosts:
        last = _ends(snapshot.now, host)
        if last:
            whole = None if any(end is None for end in last) else max(end for end in last if end is not None)
            ends.append([whole] * host.world_size)
    return _nth(ends, wanted) if wanted > 0 else snapshot.now


def _ends(now: float, host: HostView) -> list[float | None]:
    """When each resident ends, as far as its steps tell."""
    ranks = host.world_size / max(len(host.residents), 1)
    return [None if r.remaining is None else now + r.remaining / ranks for r in host.residents]


def _nth(ends: list[list[float | None]], count: int) -> float | None:
    """The `count`-th end; None if it is one that nobody knows."""
    known = sorted(end for each in ends for end in each if end is not None)
    return known[count - 1] if 0 < count <= len(known) else None


def _listed(jobs: list[str], most: int = 8) -> str:
    more = len(jobs) - most
    return ", ".join(jobs[:most]) + (f" and {more} more" if more > 0 else "")
