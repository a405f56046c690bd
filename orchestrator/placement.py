"""What fits where, on a scratch copy of the cluster that is deducted as places are given. Pure.

A refusal is a typed reason; its words are made where it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.contracts import Capacity
from orchestrator.job import Reason
from orchestrator.queue import Need, Waiting


@dataclass(frozen=True)
class HostView:
    """A host as the scheduler sees it."""

    name: str
    base: str
    world_size: int
    slots: int
    on_gpus: bool = False
    residents: frozenset[str] = frozenset()
    """Jobs in its slots."""
    visitors: frozenset[str] = frozenset()
    """Jobs that are scored on it and hold no slot."""
    adapter_parameters: int = 0
    """Of its residents together."""
    adapter_room: int | None = None
    """How many its memory has room for in all, by its own measure; None before it has measured."""

    def takes(self, adapter_parameters: int) -> bool:
        """Whether one more adapter fits beside its residents', as far as is known."""
        return self.adapter_room is None or self.adapter_parameters + adapter_parameters <= self.adapter_room

    def never_takes(self, adapter_parameters: int) -> bool:
        """Whether an adapter would not fit if it had the host for itself."""
        return self.adapter_room is not None and adapter_parameters > self.adapter_room

    @property
    def idle(self) -> bool:
        return not self.residents and not self.visitors


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
    """The scratch copy: hosts, free capacity, and what has been given away so far."""

    def __init__(
        self, capacity: Capacity, hosts: Iterable[HostView], running_tasks: int, name_seed: int
    ) -> None:
        self.hosts = {host.name: host for host in sorted(hosts, key=lambda host: host.name)}
        self.opened: list[NewHost] = []
        self.closed: list[str] = []
        self._next_name = name_seed
        self._short_of_memory: set[str] = set()
        """Bases of which a job waits for memory: what gets free is that job's, or a large one starves."""
        self._on_gpus = capacity.gpus > 0 or any(host.on_gpus for host in self.hosts.values())
        self._free_ranks = int(capacity.gpus if self._on_gpus else capacity.cpus)
        self._all_ranks = self._free_ranks + sum(host.world_size for host in self.hosts.values())
        # A task holds no CPU of its own: where ranks hold every CPU, one task at a time runs beside them.
        self._free_tasks = max(1, int(capacity.cpus)) - running_tasks

    def place(self, job: Waiting, may_open: bool = True) -> Place | Reason:
        """A place for `job`, already deducted; or why there is none now."""
        if job.need is Need.NOTHING:
            return Place(None)
        if job.need is Need.CPU:
            return self._place_task()
        if (host := self._warm_host(job)) is not None:
            self._seat(host, job)
            return Place(host.name)
        if hosts := self._hosts_of(job.base):
            return self._why_not(job, hosts)
        if job.world_size > self._all_ranks:
            return Reason.TOO_LARGE
        return self._open(job) if may_open else Reason.WAITS_FOR_HOST

    def close_idle(self, keep: frozenset[str]) -> None:
        """Close every idle host whose base is not in `keep`."""
        for host in list(self.hosts.values()):
            if host.idle and host.base not in keep:
                self._close(host)

    def _place_task(self) -> Place | Reason:
        if self._free_tasks < 1:
            return Reason.WAITS_FOR_CPU
        self._free_tasks -= 1
        return Place(None)

    def _hosts_of(self, base: str) -> list[HostView]:
        return [host for host in self.hosts.values() if host.base == base]

    def _warm_host(self, job: Waiting) -> HostView | None:
        """The fullest host that still takes the job: the others empty sooner."""
        hosts = self._hosts_of(job.base)
        if job.need is Need.SLOT:
            hosts = [host for host in hosts if self._has_slot(host, job)]
        return max(hosts, key=lambda host: (len(host.residents), host.name), default=None)

    def _has_slot(self, host: HostView, job: Waiting) -> bool:
        free = len(host.residents) < host.slots and job.base not in self._short_of_memory
        return free and host.takes(job.adapter_parameters)

    def _why_not(self, job: Waiting, hosts: list[HostView]) -> Reason:
        """Why no host of its base takes a job that wants a slot."""
        if all(host.never_takes(job.adapter_parameters) for host in hosts):
            return Reason.OUT_OF_MEMORY
        if all(len(host.residents) >= host.slots for host in hosts):
            return Reason.WAITS_FOR_SLOT
        self._short_of_memory.add(job.base)
        return Reason.WAITS_FOR_MEMORY

    def _open(self, job: Waiting) -> Place | Reason:
        """A new host for the job's base, all its ranks or none; idle hosts of other bases make room."""
        if self._free_ranks < job.world_size:
            self._make_room(job.world_size)
            return Reason.WAITS_FOR_HOST
        self._free_ranks -= job.world_size
        host = HostView(f"host-{self._next_name}", job.base, job.world_size, max(1, job.slots), self._on_gpus)
        self._next_name += 1
        self.opened.append(NewHost(host.name, host.base, host.world_size, host.slots))
        self._seat(host, job)
        return Place(host.name)

    def _make_room(self, ranks: int) -> None:
        """Close idle hosts, the largest first, if that is enough; a later snapshot has their ranks free."""
        idle = sorted((h for h in self.hosts.values() if h.idle), key=lambda h: (-h.world_size, h.name))
        if self._free_ranks + sum(host.world_size for host in idle) < ranks:
            return
        missing = ranks - self._free_ranks
        for host in idle:
            if missing > 0:
                self._close(host)
                missing -= host.world_size

    def _close(self, host: HostView) -> None:
        del self.hosts[host.name]
        self.closed.append(host.name)

    def _seat(self, host: HostView, job: Waiting) -> None:
        if job.need is Need.SLOT:
            parameters = host.adapter_parameters + job.adapter_parameters
            host = replace(host, residents=host.residents | {job.job}, adapter_parameters=parameters)
        else:
            host = replace(host, visitors=host.visitors | {job.job})
        self.hosts[host.name] = host
