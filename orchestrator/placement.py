"""What fits where, on a scratch copy of the cluster that is deducted as places are given. Pure.

A refusal is a typed reason; its words are made where it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.census import Census
from orchestrator.contracts import Capacity
from orchestrator.fairness import Shares
from orchestrator.host_view import HostView, Resident
from orchestrator.job import Reason
from orchestrator.poison import apart
from orchestrator.queue import Need, Waiting


@dataclass(frozen=True)
class NewHost:
    name: str
    base: str
    world_size: int
    slots: int


@dataclass(frozen=True)
class Place:
    """Where a job goes: a host, or (None) one CPU task."""

    host: str | None


class Room:
    """The scratch copy: hosts, free capacity, who holds what, and what has been given away so far."""

    def __init__(
        self,
        capacity: Capacity,
        hosts: Iterable[HostView],
        running_tasks: int,
        name_seed: int,
        shares: Shares,
        suspects: Mapping[str, int],
        spared_since: float = math.inf,
    ) -> None:
        """`spared_since`: see `Census`."""
        self.hosts: dict[str, HostView] = {}
        self.of_base: dict[str, dict[str, HostView]] = {}
        """Base -> its hosts by name."""
        self._with_slots: dict[str, dict[str, HostView]] = {}
        """The same, of hosts with a free slot."""
        self.shares = shares
        self.opened: list[NewHost] = []
        self.closed: list[str] = []
        self.seated: set[str] = set()
        """Jobs that were given a slot by this decision: it does not take it back."""
        self.reserved = 0
        """Ranks that are free or about to be, and that a job before in the line waits for."""
        self._suspects = suspects
        self._next_name = name_seed
        self._short_of_memory: set[str] = set()
        """Bases of which a job waits for memory: what gets free is that job's, or a large one starves."""
        hosts = tuple(hosts)
        self._on_gpus = capacity.gpus > 0 or any(host.on_gpus for host in hosts)
        self.free_ranks = int(capacity.gpus if self._on_gpus else capacity.cpus)
        self.all_ranks = self.free_ranks + sum(host.world_size for host in hosts)
        # A task holds no CPU of its own: where ranks hold every CPU, one task at a time runs beside them.
        self._free_tasks = max(1, int(capacity.cpus)) - running_tasks
        self.idle: dict[str, HostView] = {}
        self.idle_ranks = 0
        self.coming = 0
        """Ranks of hosts that everyone was told to leave."""
        self._slots_coming: dict[str, int] = {}
        self.census = Census(hosts, spared_since)
        for host in hosts:
            self._take_in(host, self.census.leaving.get(host.name, 0))
        for team, ranks in self.census.held.items():
            shares.charge(team, ranks)

    def _take_in(self, host: HostView, leaving: int) -> None:
        self._put(host)
        if leaving:
            self._slots_coming[host.base] = self._slots_coming.get(host.base, 0) + leaving
        if host.idle:
            self.idle[host.name] = host
            self.idle_ranks += host.world_size
        elif leaving == len(host.residents) and not host.visitors:
            self.coming += host.world_size

    def _put(self, host: HostView) -> None:
        """A host as it is from now on."""
        self.hosts[host.name] = host
        self.of_base.setdefault(host.base, {})[host.name] = host
        if len(host.residents) < host.slots:
            self._with_slots.setdefault(host.base, {})[host.name] = host
        elif host.base in self._with_slots:
            self._with_slots[host.base].pop(host.name, None)

    # ---- asking ----------------------------------------------------------------------------------------

    def hosts_of(self, base: str) -> Collection[HostView]:
        return self.of_base.get(base, {}).values()

    def warm_host(self, job: Waiting) -> HostView | None:
        """The fullest host that still takes the job: the others empty sooner. One that is crowded only if
        all are, and then the emptiest."""
        hosts = self.hosts_of(job.base)
        if job.need is Need.SLOT:
            with_slots = self._with_slots.get(job.base)
            if not with_slots or job.base in self._short_of_memory:
                return None
            hosts = [host for host in with_slots.values() if self._has_room(host, job)]
        return max(hosts, key=inviting, default=None)

    def _has_room(self, host: HostView, job: Waiting) -> bool:
        return host.takes(job.adapter_parameters) and self.may_share(host, job)

    def may_share(self, host: HostView, job: Waiting) -> bool:
        """Suspects of a host's death keep to their own group."""
        if not self._suspects:
            return True
        return not apart(self._suspects, job.job, (resident.job for resident in host.residents))

    def why_not(self, job: Waiting) -> Reason:
        """Why no host of its base takes a job that wants a slot."""
        hosts = self.hosts_of(job.base)
        if all(host.never_takes(job.adapter_parameters) for host in hosts):
            return Reason.OUT_OF_MEMORY
        if not self._with_slots.get(job.base):
            return Reason.WAITS_FOR_SLOT
        if any(not self.may_share(host, job) for host in hosts):
            return Reason.WAITS_APART
        self._short_of_memory.add(job.base)
        return Reason.WAITS_FOR_MEMORY

    def spare(self) -> int:
        """Ranks that a new host could have now, idle hosts giving way, and that nobody before waits for."""
        return self.free_ranks + self.idle_ranks - max(self.reserved - self.coming, 0)

    def to_come(self) -> int:
        """Ranks that nobody before waits for, those counted that are about to be free."""
        return self.free_ranks + self.idle_ranks + self.coming - self.reserved

    def slot_to_come(self, base: str) -> bool:
        """Whether someone is leaving a slot that nobody before waits for; it is then this job's."""
        coming = self._slots_coming.get(base, 0)
        self._slots_coming[base] = max(coming - 1, 0)
        return coming > 0

    # ---- giving ----------------------------------------------------------------------------------------

    def task(self) -> Place | Reason:
        """A CPU for a task, deducted."""
        if self._free_tasks < 1:
            return Reason.WAITS_FOR_CPU
        self._free_tasks -= 1
        return Place(None)

    def open(self, job: Waiting) -> Place:
        """A new host for the job's base, all its ranks; idle hosts give way, the largest first.

        The caller has seen that `spare` is enough.
        """
        for host in sorted(self.idle.values(), key=lambda host: (-host.world_size, host.name)):
            if self.free_ranks < job.world_size:
                self.close(host)
        assert self.free_ranks >= job.world_size, "opened without room"
        self.free_ranks -= job.world_size
        host = HostView(f"host-{self._next_name}", job.base, job.world_size, max(1, job.slots), self._on_gpus)
        self._next_name += 1
        self.opened.append(NewHost(host.name, host.base, host.world_size, host.slots))
        return self.seat(host, job)

    def close(self, host: HostView) -> None:
        """Its ranks are free at once: the cluster takes its processes away before it starts others."""
        del self.hosts[host.name], self.idle[host.name]
        self.idle_ranks -= host.world_size
        del self.of_base[host.base][host.name]
        self._with_slots[host.base].pop(host.name, None)
        self.free_ranks += host.world_size
        self.closed.append(host.name)

    def seat(self, host: HostView, job: Waiting) -> Place:
        if self.idle.pop(host.name, None) is not None:
            self.idle_ranks -= host.world_size
        if job.need is Need.SLOT:
            self._charge(host, job.team)
            self.seated.add(job.job)
            resident = Resident(
                job.job, job.team, job.priority, job.attained, job.remaining, job.submitted_at
            )
            parameters = host.adapter_parameters + job.adapter_parameters
            host = host.with_residents((*host.residents, resident), parameters)
        else:
            host = replace(host, visitors=host.visitors | {job.job})
        self._put(host)
        return Place(host.name)

    def release(self, host: str, jobs: Iterable[str]) -> None:
        """Residents are told to leave; their teams hold their ranks no more."""
        before, leaving = self.hosts[host], set(jobs)
        part = before.world_size / len(before.residents)
        gone = [each for each in before.residents if each.job in leaving and not each.leaving]
        self.shares.charge_each((resident.team for resident in gone), -part)
        residents = tuple(
            resident.told_to_leave() if resident.job in leaving else resident for resident in before.residents
        )
        after = before.with_residents(residents, before.adapter_parameters)
        self._put(after)
        if after.emptying:
            self.coming += after.world_size

    def _charge(self, host: HostView, team: str) -> None:
        """One more resident: each holds an equal part of its host's ranks."""
        count = len(host.residents)
        part = host.world_size / (count + 1)
        if count:
            stay = [resident.team for resident in host.residents if not resident.leaving]
            self.shares.charge_each(stay, part - host.world_size / count)
        self.shares.charge(team, part)


def inviting(host: HostView) -> tuple[bool, int, str]:
    """The greatest of the hosts that take a job is the one it goes to."""
    count = len(host.residents)
    return not host.crowded, -count if host.crowded else count, host.name
