"""`schedule(Snapshot) -> Decision`: who starts now, where, who makes way, and why the others wait. Pure.

Policy, from the outside in:
1. Between teams the lowest share goes first: `fairness`.
2. Within a team: who waited to the bound, then priority, then the queues of least attained service, then
   age: `queue`.
3. A job goes to a warm host of its base, and if all are crowded to a second one, should ranks be free; else
   a host opens on free ranks, or on those of idle hosts; else residents it may take from are preempted:
   `preemption`. What it then waits for is reserved for it.
4. A job that cannot start lets others pass, until it has waited to the bound: then what gets free is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.collector import without_collector
from orchestrator.contracts import Capacity
from orchestrator.fairness import Shares
from orchestrator.host_view import HostView
from orchestrator.job import Reason
from orchestrator.line import Line
from orchestrator.placement import NewHost, Place, Room
from orchestrator.poison import Poison
from orchestrator.policy import Policy
from orchestrator.preemption import Preemption
from orchestrator.queue import Need, Waiting, aged, in_order, parents_verdict


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
    now: float = 0.0
    policy: Policy = field(default_factory=Policy)
    usage: Mapping[str, float] = field(default_factory=dict[str, float])
    """Team -> decayed rank-seconds, as of `now`."""
    poison: Poison = field(default_factory=Poison)


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
    """Before any host is started."""
    preempt: dict[str, str] = field(default_factory=dict[str, str])
    """Resident that has to leave -> the job that goes first."""

    @property
    def moves(self) -> bool:
        """Whether acting on it changes anything: if not, the same snapshot need not be decided on again."""
        moves = (self.start_hosts, self.placements, self.start_tasks, self.free, self.close_hosts)
        return any(moves) or bool(self.preempt)


def schedule(snapshot: Snapshot) -> Decision:
    # A decision makes a hundred thousand objects and no cycle. A full collection set off by them looks at
    # all that the process ever loaded, and would take several times as long as the decision.
    with without_collector():
        return _schedule(snapshot)


def _schedule(snapshot: Snapshot) -> Decision:
    turn = Turn(snapshot)
    for job in in_order(turn.light, snapshot.policy, snapshot.now):
        turn.settle(job, parents_verdict(job) or turn.light_place(job))
    line = Line(turn.heavy, snapshot.policy, snapshot.now, passed=turn.refusals)
    while (job := line.next(turn.room.shares)) is not None:
        verdict = (parents_verdict(job) if job.parents else None) or turn.place(job)
        turn.settle(job, verdict)
        if verdict is Reason.WAITS_FOR_SLOT:
            line.close(job.team, job.base)
        elif verdict is Reason.WAITS_FOR_HOST and turn.hopeless(job):
            # Nobody behind it in its team needs less: those that have no warm host need not be asked.
            for other in line.drop(job.team, keep=turn.room.of_base):
                turn.refusals[other] = verdict
    turn.close_idle()
    return turn.decision()


class Turn:
    """One decision while it is made."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        shares = Shares(snapshot.policy, snapshot.usage)
        self.room = Room(
            snapshot.capacity,
            snapshot.hosts,
            snapshot.running_tasks,
            snapshot.next_host,
            shares,
            snapshot.poison.suspects,
            spared_since=snapshot.now - snapshot.policy.protection,
        )
        self.preemption = Preemption(self.room, snapshot.policy, snapshot.now)
        self.light: list[Waiting] = []
        self.heavy: list[Waiting] = []
        cpu, nothing, light, heavy = Need.CPU, Need.NOTHING, self.light, self.heavy
        for job in snapshot.waiting:
            need = job.need
            (light if need is cpu or need is nothing else heavy).append(job)
        self.placements: dict[str, str] = {}
        self.tasks: list[str] = []
        self.free: list[str] = []
        self.refusals: dict[str, Reason] = {}
        self._too_wide: dict[str, int] = {}
        """Team -> ranks for which a host could not be opened: no job after it in the team gets so many."""
        self._full: dict[tuple[str, str, Need], Reason] = {}
        """(team, base, need) -> why the last one had to wait: no job after it in the team goes before it."""
        self._work: dict[str, float] | None = None

    def settle(self, job: Waiting, verdict: Place | Reason) -> None:
        if isinstance(verdict, Reason):
            self.refusals[job.job] = verdict
        elif verdict.host is not None:
            self.placements[job.job] = verdict.host
        else:
            (self.tasks if job.need is Need.CPU else self.free).append(job.job)

    def light_place(self, job: Waiting) -> Place | Reason:
        return self.room.task() if job.need is Need.CPU else Place(None)

    # ---- a place on a host -----------------------------------------------------------------------------

    def place(self, job: Waiting) -> Place | Reason:
        """A place for `job`, already deducted; or why there is none now."""
        hosts = self.room.of_base.get(job.base)
        if hosts:
            return self._on_its_base(job)
        if job.world_size > self.room.all_ranks:
            return Reason.TOO_LARGE
        return self._open(job)

    def _on_its_base(self, job: Waiting) -> Place | Reason:
        key = (job.team, job.base, job.need)
        if (known := self._full.get(key)) is not None:
            return known
        if (host := self.room.warm_host(job)) is not None:
            second = host.crowded and job.need is Need.SLOT and job.world_size <= self.room.spare()
            if second and self._justifies_a_host(job):
                return self.room.open(job)
            return self.room.seat(host, job)
        verdict = self._beside(job)
        if isinstance(verdict, Reason) and verdict not in (Reason.OUT_OF_MEMORY, Reason.WAITS_APART):
            self._full[key] = verdict
        return verdict

    def _beside(self, job: Waiting) -> Place | Reason:
        """No host of its base takes it: a second host if the work justifies it, or a resident's slot."""
        reason = self.room.why_not(job)
        if reason is Reason.OUT_OF_MEMORY or self.room.slot_to_come(job.base):
            return reason
        if job.world_size <= self.room.to_come() and (
            reason is Reason.WAITS_APART or self._justifies_a_host(job)
        ):
            if job.world_size <= self.room.spare():
                return self.room.open(job)
            self.room.reserved += job.world_size
        if reason is Reason.WAITS_FOR_SLOT:
            self.preemption.slot_for(job)
        return reason

    def _justifies_a_host(self, job: Waiting) -> bool:
        """Whether what waits for a base is more than loading it once more costs; unknown work is long."""
        if self._work is None:
            self._work = {}
            long = float("inf")
            for each in self.heavy:
                known = long if each.remaining is None else each.remaining
                self._work[each.base] = self._work.get(each.base, 0.0) + known
        return self._work[job.base] > self.snapshot.policy.load * job.world_size

    def _open(self, job: Waiting) -> Place | Reason:
        """The first host of a base, all its ranks or none; others may have to make way for it."""
        room = self.room
        if job.world_size >= self._too_wide.get(job.team, room.all_ranks + 1):
            return Reason.WAITS_FOR_HOST
        if job.world_size <= room.spare():
            return room.open(job)
        missing = job.world_size - room.to_come()
        if missing <= 0 or self.preemption.ranks_for(job, missing):
            room.reserved += job.world_size
        elif aged(job, self.snapshot.policy, self.snapshot.now):
            # What gets free from now on is kept for it.
            room.reserved += max(room.to_come(), 0)
        else:
            self._too_wide[job.team] = job.world_size
        return Reason.WAITS_FOR_HOST

    def hopeless(self, job: Waiting) -> bool:
        """Whether no narrower host could be opened for anyone behind `job` in its team."""
        return self._too_wide.get(job.team) == 1

    # ---- at the end ------------------------------------------------------------------------------------

    def close_idle(self) -> None:
        """Close idle hosts that nobody will need, after they were kept warm for a while."""
        now, keep = self.snapshot.now, self.snapshot.bases_to_come
        for host in sorted(self.room.idle.values(), key=lambda host: host.name):
            if host.base not in keep and now - host.idle_since >= self.snapshot.policy.idle:
                self.room.close(host)

    def decision(self) -> Decision:
        return Decision(
            tuple(self.room.opened),
            self.placements,
            tuple(self.tasks),
            tuple(self.free),
            self.refusals,
            tuple(self.room.closed),
            self.preemption.preempted,
        )
