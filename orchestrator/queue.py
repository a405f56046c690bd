"""The order of the jobs that wait. Pure: frozen values in, frozen values out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.job import FINISHED, Reason, Status


class Need(StrEnum):
    """What a job's next step needs."""

    SLOT = "slot"
    """A slot on a host of its base: it trains."""
    HOST = "host"
    """A host of its base, no slot: it is scored."""
    CPU = "cpu"
    """A CPU for one task."""
    NOTHING = "nothing"


@dataclass(frozen=True)
class Waiting:
    """A job that holds nothing its next step needs."""

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


def in_order(jobs: Iterable[Waiting]) -> tuple[Waiting, ...]:
    """Who goes first: the higher priority, then the older; the id decides between equals."""
    return tuple(sorted(jobs, key=lambda job: (-job.priority, job.submitted_at, job.job)))


def parents_verdict(job: Waiting) -> Reason | None:
    """Why a job's parents keep it back; None when all have succeeded."""
    if any(status in FINISHED and status is not Status.SUCCEEDED for status in job.parents):
        return Reason.PARENT_FAILED
    if any(status is not Status.SUCCEEDED for status in job.parents):
        return Reason.WAITS_FOR_PARENTS
    return None
