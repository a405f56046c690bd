"""The figures of the scheduling policy, and the teams it is fair between. Frozen values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

HOUR = 3600.0
DEFAULT_TEAM = "default"
"""Of jobs that name no team."""


@dataclass(frozen=True)
class Team:
    """A team's claim. Ranks are GPUs, or CPUs where there are no GPUs."""

    weight: float = 1.0
    """Of what nobody has a quota for, relative to the other teams' weights."""
    quota: float = 0.0
    """Ranks that are its own whenever it wants them. What it uses beyond is borrowed; it can be reclaimed."""


_UNNAMED = Team()


@dataclass(frozen=True)
class Policy:
    """Times in seconds, service in rank-seconds."""

    half_life: float = 12 * HOUR
    """After so long a team's past use counts half (Slurm's PriorityDecayHalfLife)."""
    levels: tuple[float, ...] = (4 * HOUR, 32 * HOUR, 256 * HOUR)
    """Rising: service at which a job falls into the next queue (Tiresias, NSDI'19, section 3.3)."""
    most_waiting: float = 24 * HOUR
    """A job that has waited so long in a row goes before every younger wait of its team."""
    protection: float = 0.5 * HOUR
    """A resident is not preempted for so long after it was seated: at most one preemption a time."""
    most_preempted: int = 64
    """Residents told to leave by one decision, a whole host's at once; the next one goes on. Each saves its
    checkpoint, and no decision is longer for a crowd (YARN's total_preemption_per_round)."""
    idle: float = 600.0
    """A host that nobody needs is kept warm for so long, unless its ranks are wanted."""
    load: float = 60.0
    """What opening a host costs: a second one of a base opens only for work that takes longer."""
    teams: Mapping[str, Team] = field(default_factory=dict[str, Team])
    """Those that a `teams.yaml` names; every other team is as `Team()`."""

    def team(self, name: str) -> Team:
        return self.teams.get(name, _UNNAMED)

    def level(self, service: float) -> int:
        """The queue of a job with so much service: 0 goes first."""
        return bisect_right(self.levels, service)
