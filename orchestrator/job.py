"""A job's status, the reasons for it, and the words a user reads. Pure tables, no I/O.

One door changes a status: `Store.switch_status`, which asks `next_status` here and writes the event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    WAITING = "WAITING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def finished(self) -> bool:
        return self in FINISHED


FINISHED = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})

ALLOWED: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.STARTING, Status.FAILED, Status.CANCELLED}),
    Status.STARTING: frozenset(
        {Status.RUNNING, Status.STOPPING, Status.WAITING, Status.FAILED, Status.CANCELLED}
    ),
    Status.RUNNING: frozenset({Status.STOPPING, Status.WAITING, Status.FAILED, Status.CANCELLED}),
    Status.STOPPING: frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.WAITING}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


class Reason(StrEnum):
    SUBMITTED = "submitted"
    WAITS_FOR_PARENTS = "waits_for_parents"
    WAITS_FOR_HOST = "waits_for_host"
    WAITS_FOR_SLOT = "waits_for_slot"
    WAITS_FOR_MEMORY = "waits_for_memory"
    WAITS_FOR_CPU = "waits_for_cpu"
    WAITS_APART = "waits_apart"
    PLACED = "placed"
    ATTACHED = "attached"
    STEPS_DONE = "steps_done"
    DONE = "done"
    PREEMPTED = "preempted"
    HOST_LOST = "host_lost"
    CONTROLLER_RESTARTED = "controller_restarted"
    INTERRUPTED = "interrupted"
    PAUSED_BY_USER = "paused_by_user"
    RESUMED_BY_USER = "resumed_by_user"
    REGISTRY_AWAY = "registry_away"
    DISK_FULL = "disk_full"
    CHECKPOINTS_AWAY = "checkpoints_away"
    CANCELLED_BY_USER = "cancelled_by_user"
    PARENT_FAILED = "parent_failed"
    BAD_DATA = "bad_data"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    TOO_LARGE = "too_large"
    OUT_OF_RETRIES = "out_of_retries"
    GATE_FAILED = "gate_failed"
    FUSION_REFUSED = "fusion_refused"
    RELEASE_REFUSED = "release_refused"
    OUT_OF_TIME = "out_of_time"
    QUARANTINED = "quarantined"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True)
class ReasonRow:
    """What a reason does to a job: its next status, how often it may end an attempt, its words."""

    status: Status
    retries: int | None
    """How often it may send a job that was under way back to WAITING; None: as often as it happens."""
    words: str


MANY = 1_000

REASONS: dict[Reason, ReasonRow] = {
    Reason.SUBMITTED: ReasonRow(Status.WAITING, None, "submitted"),
    Reason.WAITS_FOR_PARENTS: ReasonRow(Status.WAITING, None, "waits for the jobs it depends on"),
    Reason.WAITS_FOR_HOST: ReasonRow(Status.WAITING, None, "waits for a host to load its base"),
    Reason.WAITS_FOR_SLOT: ReasonRow(Status.WAITING, None, "waits for a free slot on a host of its base"),
    Reason.WAITS_FOR_MEMORY: ReasonRow(Status.WAITING, None, "waits for memory on a host of its base"),
    Reason.WAITS_FOR_CPU: ReasonRow(Status.WAITING, None, "waits for a free CPU"),
    Reason.WAITS_APART: ReasonRow(
        Status.WAITING, None, "waits for a host without others: hosts died with it aboard"
    ),
    Reason.PLACED: ReasonRow(Status.STARTING, None, "placed on a host"),
    Reason.ATTACHED: ReasonRow(Status.RUNNING, None, "running"),
    Reason.STEPS_DONE: ReasonRow(Status.STOPPING, None, "all steps done; leaving the cluster"),
    Reason.DONE: ReasonRow(Status.SUCCEEDED, 0, "done"),
    Reason.PREEMPTED: ReasonRow(Status.WAITING, MANY, "paused for a job that goes first"),
    Reason.HOST_LOST: ReasonRow(Status.WAITING, MANY, "its host was lost; goes on from the last checkpoint"),
    Reason.CONTROLLER_RESTARTED: ReasonRow(
        Status.WAITING, None, "chorus was restarted; goes on from the last checkpoint"
    ),
    Reason.INTERRUPTED: ReasonRow(
        Status.WAITING, None, "chorus was stopped; run it again to go on from the last checkpoint"
    ),
    Reason.PAUSED_BY_USER: ReasonRow(Status.WAITING, None, "paused; `chorus resume` lets it go on"),
    Reason.RESUMED_BY_USER: ReasonRow(Status.WAITING, None, "waits again after a pause"),
    Reason.REGISTRY_AWAY: ReasonRow(
        Status.WAITING, None, "the registry does not answer; will be tried again"
    ),
    Reason.DISK_FULL: ReasonRow(
        Status.WAITING, 100, "the disk is full; will be tried again, from the last checkpoint"
    ),
    Reason.CHECKPOINTS_AWAY: ReasonRow(
        Status.WAITING,
        None,
        "the object store of checkpoints does not answer; will be tried again, from the last checkpoint",
    ),
    Reason.CANCELLED_BY_USER: ReasonRow(Status.CANCELLED, 0, "cancelled"),
    Reason.PARENT_FAILED: ReasonRow(Status.FAILED, 0, "a job it depends on did not succeed"),
    Reason.BAD_DATA: ReasonRow(Status.FAILED, 0, "its data cannot be used"),
    Reason.DIVERGED: ReasonRow(Status.FAILED, 0, "its gradient stayed non-finite"),
    Reason.OUT_OF_MEMORY: ReasonRow(Status.FAILED, 0, "it does not fit in memory"),
    Reason.TOO_LARGE: ReasonRow(Status.FAILED, 0, "it needs more ranks than the cluster has"),
    Reason.OUT_OF_RETRIES: ReasonRow(Status.FAILED, 0, "it was tried again as often as is allowed"),
    Reason.GATE_FAILED: ReasonRow(Status.FAILED, 0, "it did not pass its gates"),
    Reason.FUSION_REFUSED: ReasonRow(Status.FAILED, 0, "its adapters cannot be fused"),
    Reason.RELEASE_REFUSED: ReasonRow(Status.FAILED, 0, "its release cannot be written"),
    Reason.OUT_OF_TIME: ReasonRow(Status.FAILED, 0, "it ran longer than its max_duration"),
    Reason.QUARANTINED: ReasonRow(Status.FAILED, 0, "it takes down the hosts it trains on"),
    Reason.INTERNAL_ERROR: ReasonRow(Status.FAILED, 0, "an error inside chorus"),
}


class IllegalSwitch(Exception):
    """A status change that the table does not allow: a bug in the caller, never a user's fault."""


def next_status(current: Status, reason: Reason) -> Status:
    """The status that `reason` leads to from `current`. Raises IllegalSwitch."""
    target = REASONS[reason].status
    if target != current and target not in ALLOWED[current]:
        raise IllegalSwitch(f"{current} -> {target} ({reason}) is not allowed")
    return target


def ends_attempt(current: Status, reason: Reason) -> bool:
    """Whether `reason` sends a job that is under way back to the queue: what its retries count."""
    return current is not Status.WAITING and REASONS[reason].status is Status.WAITING


def stays_paused(now: Reason, then: Reason) -> bool:
    """Whether a job that someone has paused is to stay so, whatever else sends it back to the queue."""
    waits = REASONS[then].status is Status.WAITING and then is not Reason.RESUMED_BY_USER
    return now is Reason.PAUSED_BY_USER and waits


def within_budget(reason: Reason, message: str, used: int) -> tuple[Reason, str]:
    """The reason and message of an attempt that ends, when `used` earlier ones ended for the same reason."""
    row = REASONS[reason]
    if row.retries is None or used < row.retries:
        return reason, message
    return Reason.OUT_OF_RETRIES, f"{used} times: {row.words}{': ' if message else ''}{message}"


def run_status(statuses: Iterable[Status]) -> Status:
    """A run's status, derived from its jobs': finished when all are, and then the worst of them."""
    found = set(statuses)
    if found - FINISHED:
        return Status.WAITING if found <= {Status.WAITING} else Status.RUNNING
    worst_first = (Status.FAILED, Status.CANCELLED)
    return next((status for status in worst_first if status in found), Status.SUCCEEDED)
