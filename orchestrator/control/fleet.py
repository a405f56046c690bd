"""The hosts this controller has started, and who sits where. Starts and stops them through the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.contracts import Cluster, LivingHost
from orchestrator.placement import NewHost
from orchestrator.queue import Need
from workers.types import BaseSpec, HostMeasured, HostReady


@dataclass
class Host:
    """One host from its start to its end."""

    name: str
    base: str
    world_size: int
    slots: int
    on_gpus: bool
    ready: HostReady | None = None
    measured: HostMeasured | None = None
    residents: dict[str, int] = field(default_factory=dict[str, int])
    """Job in a slot -> its attempt. A cancelled one stays until the host says that it has left."""
    adapter_parameters: dict[str, int] = field(default_factory=dict[str, int])
    """Job in a slot -> parameters of its adapter."""
    step_tokens: dict[str, int] = field(default_factory=dict[str, int])
    """Job in a slot -> padded tokens of its last step, on all ranks."""
    visitors: set[str] = field(default_factory=set[str])
    leaving: set[str] = field(default_factory=set[str])
    """Residents that were told to leave their slots."""
    idle_since: float | None = None
    """When it was first seen without anyone."""

    @property
    def seated(self) -> set[str]:
        return set(self.residents) | self.visitors

    @property
    def saturated(self) -> bool:
        """Whether a step of all its residents takes more than one tick of what it found to be its budget."""
        if self.measured is None or self.measured.calibrating:
            return False
        return self._tokens >= self.measured.tokens_per_tick * self.world_size

    @property
    def crowded(self) -> bool:
        """Whether its residents' own work is more than half of a tick: each notices one more."""
        half = self.measured.half_speed_tokens if self.measured else None
        return self.saturated or (half is not None and self._tokens > half * self.world_size)

    @property
    def _tokens(self) -> int:
        return sum(self.step_tokens.values())


class Fleet:
    """Hosts by name. A job sits on one host at most."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._hosts: dict[str, Host] = {}
        self._started = 0

    @property
    def hosts(self) -> tuple[Host, ...]:
        return tuple(self._hosts.values())

    @property
    def next_number(self) -> int:
        return self._started + 1

    def start(self, new: NewHost, spec: BaseSpec, on_gpus: bool) -> None:
        """Raises BadInput if the cluster can never hold such a host."""
        self._cluster.start_host(new.name, spec, new.world_size)
        self._started += 1
        self._hosts[new.name] = Host(new.name, new.base, new.world_size, new.slots, on_gpus)

    def adopt(self, living: LivingHost, base: str) -> Host:
        """Hold a host that outlived the last controller; `base` is what its jobs call it."""
        slots = living.base.slots
        host = Host(living.name, base, living.world_size, slots, living.on_gpus)
        host.ready, host.measured = living.roll.ready, living.roll.measured
        self._hosts[host.name] = host
        # New hosts go on from the highest number, so that no two have one name.
        self._started = max(self._started, int(host.name.rpartition("-")[2]))
        return host

    def stop(self, name: str) -> Host:
        host = self._hosts.pop(name)
        self._cluster.stop_host(name)
        return host

    def stop_all(self) -> None:
        for host in self.hosts:
            self.stop(host.name)

    # ---- seats -----------------------------------------------------------------------------------------

    def seat(self, job: str, attempt: int, host: str, need: Need, adapter_parameters: int) -> None:
        if need is Need.SLOT:
            self._hosts[host].residents[job] = attempt
            self._hosts[host].adapter_parameters[job] = adapter_parameters
        else:
            self._hosts[host].visitors.add(job)

    def host_of(self, job: str) -> Host | None:
        """Where a job sits; None if nowhere."""
        return next((host for host in self.hosts if job in host.seated), None)

    def vacate_slot(self, job: str, attempt: int) -> None:
        """The host says that this attempt has left its slot."""
        for host in self.hosts:
            if host.residents.get(job) == attempt:
                del host.residents[job]
                del host.adapter_parameters[job]
                host.step_tokens.pop(job, None)
                host.leaving.discard(job)

    def vacate(self, job: str) -> None:
        """The job needs no host now. A slot is given back only by the host itself: `vacate_slot`."""
        for host in self.hosts:
            host.visitors.discard(job)
