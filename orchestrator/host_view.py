"""A host and who is on it, as the scheduler sees them. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.policy import DEFAULT_TEAM


@dataclass(frozen=True, slots=True)
class Resident:
    """A job in a slot."""

    job: str
    team: str = DEFAULT_TEAM
    priority: int = 0
    attained: float = 0.0
    """Rank-seconds it has had."""
    remaining: float | None = None
    """Rank-seconds it still needs, once the time of a step is known."""
    submitted_at: float = 0.0
    preempted_at: float | None = None
    """When it was last preempted."""
    leaving: bool = False
    """It was told to leave and has not yet: its slot is not free, and it has nothing to give."""

    def told_to_leave(self) -> Resident:
        # `dataclasses.replace` takes four times as long, here and below: a decision does it a thousand times.
        return Resident(
            self.job, self.team, self.priority, self.attained, self.remaining, self.submitted_at,
            self.preempted_at, True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostView:
    """A host as the scheduler sees it."""

    name: str
    base: str
    world_size: int
    slots: int
    on_gpus: bool = False
    residents: tuple[Resident, ...] = ()
    visitors: frozenset[str] = frozenset()
    """Jobs that are scored on it and hold no slot."""
    adapter_parameters: int = 0
    """Of its residents together."""
    adapter_room: int | None = None
    """How many its memory has room for in all, by its own measure; None before it has measured."""
    idle_since: float = 0.0
    """When its last job left it."""
    crowded: bool = False
    """Its residents' own work is more than half of a tick, what they share the rest: each notices one more,
    who is better off on other ranks while any are free."""

    def takes(self, adapter_parameters: int) -> bool:
        """Whether one more adapter fits beside its residents', as far as is known."""
        return self.adapter_room is None or self.adapter_parameters + adapter_parameters <= self.adapter_room

    def never_takes(self, adapter_parameters: int) -> bool:
        """Whether an adapter would not fit if it had the host for itself."""
        return self.adapter_room is not None and adapter_parameters > self.adapter_room

    def with_residents(self, residents: tuple[Resident, ...], adapter_parameters: int) -> HostView:
        return HostView(
            self.name, self.base, self.world_size, self.slots, self.on_gpus, residents, self.visitors,
            adapter_parameters, self.adapter_room, self.idle_since, self.crowded,
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        return not self.residents and not self.visitors

    @property
    def emptying(self) -> bool:
        """Everyone on it has been told to leave: its ranks are about to be free."""
        return not self.visitors and all(resident.leaving for resident in self.residents)
