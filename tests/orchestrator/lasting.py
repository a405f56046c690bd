"""Hosts in memory that outlive their controller, with the real mailbox between the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.contracts import LivingHost
from tests.orchestrator.fakes import FakeCluster, FakeHost, Faults
from workers.mail import Mail
from workers.types import Attach, Evaluate, SearchWeights, StepDone


@dataclass
class Machines:
    """What goes on without a controller; counts what was done on it."""

    hosts: dict[str, FakeHost] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    bases: dict[str, Any] = field(default_factory=dict)
    mails: dict[str, Mail] = field(default_factory=dict)
    steps: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(job, step) -> how often it was done."""
    attached: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(job, attempt)."""
    requests: Counter[str] = field(default_factory=Counter)
    """Scores and searches, by step id."""
    opened: int = 0

    def work(self, name: str) -> None:
        """A round of one host."""
        host, mail = self.hosts[name], self.mails[name]
        for command in mail.commands(0.0):
            host.mail.append(command)
            if isinstance(command, Attach):
                self.attached[command.job.job, command.job.attempt] += 1
            if isinstance(command, Evaluate | SearchWeights):
                self.requests[command.request] += 1
        events = host.poll()
        self.steps.update((event.job, event.step) for event in events if isinstance(event, StepDone))
        mail.put(events)


class Lasting(FakeCluster):
    """One controller's hold on them."""

    def __init__(self, machines: Machines, cpus: float = 2.0, faults: Faults | None = None) -> None:
        super().__init__(cpus, faults)
        self.machines = machines
        self.hosts, self.sizes = machines.hosts, machines.sizes
        self.epoch = 0
        self.after: dict[str, int] = {}

    def adopt(self, epoch: int) -> Sequence[LivingHost]:
        self.epoch = epoch
        rolls = {name: self.machines.mails[name].take_over(epoch) for name in self.hosts}
        self.after = {name: roll.after for name, roll in rolls.items()}
        bases, sizes = self.machines.bases, self.sizes
        return [LivingHost(name, bases[name], sizes[name], False, roll) for name, roll in rolls.items()]

    def start_host(self, host: str, base: Any, world_size: int) -> None:
        assert host not in self.hosts, f"a host named {host} lives already"
        super().start_host(host, base, world_size)
        self.machines.bases[host], self.machines.mails[host] = base, Mail(self.epoch)
        self.machines.opened += 1
        self.after[host] = 0

    def send(self, host: str, command: Any) -> None:
        self.log.append((type(command).__name__, command))
        if host in self.hosts:
            self.machines.mails[host].submit(command, self.epoch)

    def poll(self, host: str) -> list[Any]:
        if host not in self.hosts:
            return []
        self.machines.work(host)
        polled = self.machines.mails[host].poll(self.after[host], self.epoch)
        self.after[host] = polled.last
        return list(polled.events)
