"""What waits, and in which order within a team. Pure: frozen values in, frozen values out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import TypeAlias

from orchestrator.job import FINISHED, Reason, Status
from orchestrator.policy import DEFAULT_TEAM, Policy


class Need(StrEnum):
    """What a job's next step needs."""

    SLOT = "slot"
    """A slot on a host of its base: it trains."""
    HOST = "host"
    """A host of its base, no slot: it is scored."""
    CPU = "cpu"
    """A CPU for one task."""
    NOTHING = "nothing"


Standing: TypeAlias = tuple[int, int, int]
"""What one job must have less of than another of its team to take its place: aged (0) or not, minus the
priority, the queue it is in."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that holds nothing its next step needs.

    Those who make it intern `base` and `team`: ten thousand strings for twenty teams are read from memory at
    each look, and take a decision a fifth longer.
    """

    job: str
    need: Need
    base: str
    """Key of the base and the number of ranks that hold it: equal keys share hosts."""
    world_size: int
    slots: int
    """Slots of a host of this base."""
    priority: int
    submitted_at: float
    parents: tuple[Status, ...] = ()
    adapter_parameters: int = 0
    """Of the adapter it trains."""
    team: str = DEFAULT_TEAM
    attained: float = 0.0
    """Rank-seconds it has had."""
    remaining: float | None = None
    """Rank-seconds it still needs, once the time of a step is known."""
    waiting_since: float | None = None
    """When this wait began; None: with its submission."""

    @property
    def since(self) -> float:
        return self.submitted_at if self.waiting_since is None else self.waiting_since


def level(attained: float, remaining: float | None, policy: Policy) -> int:
    """The queue of a job: by what it still needs where that is known, else by what it has had."""
    return bisect_right(policy.levels, attained if remaining is None else remaining)


def aged(job: Waiting, policy: Policy, now: float) -> bool:
    """Whether it has waited to the bound."""
    return now - job.since >= policy.most_waiting


def standing(job: Waiting, policy: Policy, now: float) -> Standing:
    return int(not aged(job, policy, now)), -job.priority, level(job.attained, job.remaining, policy)


def order_key(job: Waiting, policy: Policy, now: float) -> tuple[int, int, int, float, str]:
    """Sorts a team's jobs: who waited to the bound, the longest wait first; then priority, queue, age."""
    if aged(job, policy, now):
        return 0, 0, 0, job.since, job.job
    return *standing(job, policy, now), job.submitted_at, job.job


def in_order(jobs: Iterable[Waiting], policy: Policy, now: float) -> tuple[Waiting, ...]:
    """Who goes first among the jobs of a team."""
    return tuple(sorted(jobs, key=lambda job: order_key(job, policy, now)))


def by_team(jobs: Iterable[Waiting], policy: Policy, now: float) -> dict[str, list[Waiting]]:
    """Each team's jobs, in order.

    What `in_order` does, for all that wait in every decision: sorted by age alone, and dealt out by the rest.
    """
    bound, levels = policy.most_waiting, policy.levels
    teams: dict[str, list[Waiting]] = {}
    classes: dict[tuple[str, int, int], list[Waiting]] = {}
    # By one value and then by the other: half the time of by both at once.
    ordered = sorted(jobs, key=attrgetter("job"))
    ordered.sort(key=attrgetter("submitted_at"))
    for job in ordered:
        since = job.submitted_at if job.waiting_since is None else job.waiting_since
        if now - since >= bound:
            teams.setdefault(job.team, []).append(job)
            continue
        service = job.attained if job.remaining is None else job.remaining
        key = job.team, -job.priority, bisect_right(levels, service)
        try:
            classes[key].append(job)
        except KeyError:
            classes[key] = [job]
    for waited in teams.values():
        waited.sort(key=attrgetter("since", "job"))
    for key in sorted(classes):
        teams.setdefault(key[0], []).extend(classes[key])
    return teams


def parents_verdict(job: Waiting) -> Reason | None:
    """Why a job's parents keep it back; None when all have succeeded."""
    if not job.parents:
        return None
    if any(status in FINISHED and status is not Status.SUCCEEDED for status in job.parents):
        return Reason.PARENT_FAILED
    if any(status is not Status.SUCCEEDED for status in job.parents):
        return Reason.WAITS_FOR_PARENTS
    return None
