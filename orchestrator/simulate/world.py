"""The cluster in simulated time: hosts that load, residents that get on, what the scheduler is shown.

A host takes `load` seconds to open. A tick of residents lasts `shared` and what each of them adds to it: what
they share (the pass of the base, its weights gathered) costs once, their own part each. Of k alike it lasts
`shared + (1 - shared) * k` times one's. One told to leave has left at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.contracts import Capacity
from orchestrator.fairness import grown
from orchestrator.host_view import HostView, Resident
from orchestrator.policy import DEFAULT_TEAM, Policy
from orchestrator.queue import Need, Waiting
from orchestrator.scheduler import Decision, Snapshot
from orchestrator.simulate.traces import TraceJob

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Setting:
    """What is simulated. Times in seconds."""

    ranks: int
    every: float = 300.0
    """Between two decisions while anybody waits."""
    load: float = 60.0
    """From opening a host to its first step."""
    shared: float = 0.0
    """Part of a tick (of one that takes 1 alone) that residents share; 0: two take as long together as one
    after the other."""
    steps_known: bool = False
    """Whether a job's steps to come are known once it has run, as a recipe's are."""


@dataclass(slots=True)
class SimJob:
    trace: TraceJob
    team: str
    """As the scheduler is shown it."""
    left: float
    """Seconds that it still has to run, alone on a host."""
    since: float
    """When its wait began, or when it was seated."""
    host: SimHost | None = None
    attained: float = 0.0
    waited: float = 0.0
    longest_wait: float = 0.0
    preemptions: int = 0
    preempted_at: float | None = None
    ended_at: float | None = None

    @property
    def remaining(self) -> float | None:
        """Rank-seconds, at its pace so far."""
        done = self.trace.seconds - self.left
        return self.attained / done * self.left if done > 0 else None


@dataclass(slots=True)
class SimHost:
    name: str
    base: str
    world_size: int
    slots: int
    ready: float
    """When it has loaded."""
    idle_since: float
    residents: list[SimJob] = field(default_factory=list[SimJob])

    def all_done(self, now: float) -> float:
        """A time by which all its residents have ended, if nobody joins them."""
        ticks = [job.trace.tick for job in self.residents] or [1.0]
        return max(now, self.ready) + sum(job.left for job in self.residents) * sum(ticks) / min(ticks)


class World:
    """Jobs come by `advance`; `act` carries out what was decided on `snapshot`."""

    def __init__(self, jobs: Sequence[TraceJob], setting: Setting, policy: Policy, fair: bool) -> None:
        self.setting = setting
        self.policy = policy
        self.now = 0.0
        self.jobs: dict[str, SimJob] = {}
        self.hosts: dict[str, SimHost] = {}
        self.waiting: dict[str, Waiting] = {}
        self.demand: dict[str, int] = {}
        """Team -> ranks that its unfinished jobs want."""
        self.free = setting.ranks
        self._fair = fair
        self._trace = jobs
        self._came = 0
        self._ended = 0
        self._opened = 0
        self._usage: dict[str, float] = {}
        self._of_base: dict[str, int] = {}

    @property
    def finished(self) -> bool:
        return self._ended == len(self._trace)

    @property
    def next_arrival(self) -> float | None:
        return self._trace[self._came].submitted_at if self._came < len(self._trace) else None

    # ---- time ------------------------------------------------------------------------------------------

    def advance(self, to: float) -> None:
        """Everything that happens until `to` without a decision."""
        had: dict[str, float] = {}
        for host in self.hosts.values():
            self._run(host, to, had)
        seconds = to - self.now
        if seconds > 0 and self._fair:
            held = {team: value / seconds for team, value in had.items()}
            self._usage = grown(self._usage, held, seconds, self.policy.half_life)
        self.now = to
        while (arrival := self.next_arrival) is not None and arrival <= to:
            self.arrive(self._trace[self._came])
            self._came += 1

    def _run(self, host: SimHost, to: float, had: dict[str, float]) -> None:
        """From one end of a resident to the next: the others are faster without it."""
        begin = self.now
        while host.residents and begin < to:
            count = len(host.residents)
            tick = self._tick(host)
            # While it loads, its ranks are held and nothing trains.
            start = max(begin, host.ready)
            until = min(to, start + tick * min(job.left / job.trace.tick for job in host.residents))
            for job in host.residents:
                job.left -= max(until - start, 0.0) * job.trace.tick / tick
                service = (until - begin) * host.world_size / count
                job.attained += service
                had[job.team] = had.get(job.team, 0.0) + service
            for job in [job for job in host.residents if job.left <= _ROUNDING]:
                self._end(job, until)
            begin = until

    def _tick(self, host: SimHost) -> float:
        """How long a tick of its residents lasts."""
        shared = self.setting.shared
        return shared + sum(max(job.trace.tick - shared, 0.0) for job in host.residents)

    def arrive(self, trace: TraceJob) -> None:
        """A job is submitted now."""
        team = sys.intern(trace.team if self._fair else DEFAULT_TEAM)
        job = SimJob(trace, team, trace.seconds, trace.submitted_at)
        self.jobs[trace.job] = job
        self.demand[trace.team] = self.demand.get(trace.team, 0) + trace.ranks
        if trace.base:
            self._of_base[trace.base] = self._of_base.get(trace.base, 0) + 1
        self._queue(job)

    def _queue(self, job: SimJob) -> None:
        trace = job.trace
        self.waiting[trace.job] = Waiting(
            trace.job,
            Need.SLOT,
            sys.intern(trace.base or trace.job),
            trace.ranks,
            trace.slots,
            trace.priority,
            trace.submitted_at,
            team=job.team,
            attained=job.attained,
            remaining=job.remaining if self.setting.steps_known else None,
            waiting_since=job.since,
        )

    def _end(self, job: SimJob, now: float) -> None:
        self._leave(job, now)
        job.ended_at = now
        self._ended += 1
        self.demand[job.trace.team] -= job.trace.ranks
        if job.trace.base:
            self._of_base[job.trace.base] -= 1

    def _leave(self, job: SimJob, now: float) -> None:
        assert job.host is not None
        job.host.residents.remove(job)
        job.host.idle_since = now
        job.host = None

    # ---- deciding --------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot(
            Capacity(cpus=0, gpus=self.free),
            tuple(self._view(host) for host in self.hosts.values()),
            tuple(self.waiting.values()),
            bases_to_come=frozenset(base for base, count in self._of_base.items() if count),
            next_host=self._opened + 1,
            now=self.now,
            policy=self.policy,
            usage=self._usage,
        )

    def _view(self, host: SimHost) -> HostView:
        residents = tuple(self._resident(job) for job in host.residents)
        return HostView(
            *(host.name, host.base, host.world_size, host.slots, True, residents),
            idle_since=host.idle_since,
            crowded=self._crowded(host),
        )

    def _crowded(self, host: SimHost) -> bool:
        """As a host finds it: the residents' own parts are more of a tick than what they share."""
        return self._tick(host) > 2 * self.setting.shared

    def _resident(self, job: SimJob) -> Resident:
        return Resident(
            job.trace.job,
            job.team,
            job.trace.priority,
            job.attained,
            job.remaining if self.setting.steps_known else None,
            job.trace.submitted_at,
            job.preempted_at,
        )

    def act(self, decision: Decision) -> None:
        for victim in decision.preempt:
            self._preempt(self.jobs[victim])
        for name in decision.close_hosts:
            self.free += self.hosts.pop(name).world_size
        for new in decision.start_hosts:
            self._opened += 1
            self.free -= new.world_size
            ready = self.now + self.setting.load
            self.hosts[new.name] = SimHost(new.name, new.base, new.world_size, new.slots, ready, self.now)
        for name, host in decision.placements.items():
            self._seat(self.jobs[name], self.hosts[host])

    def _preempt(self, job: SimJob) -> None:
        self._leave(job, self.now)
        job.since = job.preempted_at = self.now
        job.preemptions += 1
        self._queue(job)

    def _seat(self, job: SimJob, host: SimHost) -> None:
        del self.waiting[job.trace.job]
        wait = self.now - job.since
        job.waited += wait
        job.longest_wait = max(job.longest_wait, wait)
        job.since, job.host = self.now, host
        host.residents.append(job)

    # ---- measuring -------------------------------------------------------------------------------------

    def held(self) -> dict[str, float]:
        """Team (as the trace names it) -> ranks that its residents hold."""
        found: dict[str, float] = {}
        for host in self.hosts.values():
            for job in host.residents:
                part = host.world_size / len(host.residents)
                found[job.trace.team] = found.get(job.trace.team, 0.0) + part
        return found
