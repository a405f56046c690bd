"""Which job takes its hosts down: suspects are kept apart in ever smaller groups until one is alone. Pure.

A job is suspected when a second host dies under it and it got no further in between: a job that kills at one
of its own steps stops there each time, while a node that fails by chance does so anywhere. The suspects of a
death are split: each half may then sit only with its own half, and so on at each further death. The one that
dies alone twice where it died before is the culprit. One that gets past the step at which it died is
acquitted. So n suspects take at most log2(n) + 4 deaths, and the innocent lose what they did since their last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SOLO_DEATHS = 2


@dataclass(frozen=True)
class Poison:
    """What is known of the jobs whose hosts died."""

    died_at: Mapping[str, int] = field(default_factory=dict[str, int])
    """Job -> the furthest step it had done when its last host died."""
    alone: Mapping[str, int] = field(default_factory=dict[str, int])
    """Job -> how often a host died with it alone aboard, and no further than before."""
    groups: tuple[frozenset[str], ...] = ()
    """Suspects: each group keeps to itself."""

    @property
    def suspects(self) -> dict[str, int]:
        """Suspect -> number of its group."""
        return {job: number for number, group in enumerate(self.groups) for job in group}


def apart(suspects: Mapping[str, int], job: str, residents: Iterable[str]) -> bool:
    """Whether a job may not sit with these: suspects sit with their own group alone."""
    group = suspects.get(job)
    return any(suspects.get(resident) != group for resident in residents)


def after_death(poison: Poison, reached: Mapping[str, int]) -> tuple[Poison, str | None]:
    """What is known once a host died under jobs that had done so many steps; and the culprit, if found."""
    stuck = sorted(job for job, step in reached.items() if step <= poison.died_at.get(job, -1))
    died_at, alone = {**poison.died_at, **reached}, dict(poison.alone)
    if stuck and len(reached) == 1:
        (job,) = stuck
        alone[job] = alone.get(job, 0) + 1
        if alone[job] == SOLO_DEATHS:
            # The others of its inquest are free again.
            return _without(Poison(died_at, alone), {job}), job
    untouched = [group.difference(reached) for group in poison.groups]
    middle = (len(stuck) + 1) // 2
    groups = [*untouched, frozenset(stuck[:middle]), frozenset(stuck[middle:])]
    return Poison(died_at, alone, tuple(group for group in groups if group)), None


def acquitted(poison: Poison, step_of: Mapping[str, int]) -> Poison:
    """Without jobs that have finished (they are not in `step_of`) or got past the step at which they died."""
    return _without(
        poison, {job for job, step in poison.died_at.items() if step_of.get(job, step + 1) > step}
    )


def _without(poison: Poison, jobs: set[str]) -> Poison:
    if not jobs:
        return poison
    died_at = {job: step for job, step in poison.died_at.items() if job not in jobs}
    alone = {job: count for job, count in poison.alone.items() if job not in jobs}
    groups = (group - jobs for group in poison.groups)
    return Poison(died_at, alone, tuple(group for group in groups if group))
