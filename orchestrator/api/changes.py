"""`cancel`, `pause`, `resume`, `priority`: asked of the controller at work, else done here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from orchestrator.control.show import works_elsewhere
from orchestrator.home import Home, HomeBusy
from orchestrator.job import Reason, Status
from orchestrator.recipe.parts import PRIORITIES
from orchestrator.store.rows import JobRow, RequestKind
from orchestrator.store.store import Store
from workers.types import BadInput


def change(
    store: Store, home: Home, jobs: Sequence[JobRow], kind: RequestKind, who: str, value: Any = None
) -> tuple[list[str], bool]:
    """Which of the jobs are not finished, and whether it is done: False if the one at work was asked, here or
    in another home of this store.

    `jobs` in the order of their run.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(home.claim())
            if works_elsewhere(store, home.folder):
                raise HomeBusy
        except HomeBusy:
            for job in jobs:
                store.request(job.id, kind, who, value)
            return [job.id for job in jobs], False
        # Read again: who worked here until now may have ended some.
        found = [store.job(job.id) for job in jobs]
        unfinished = [job for job in found if not job.status.finished]
        for job in reversed(unfinished):
            _do(store, job, kind, who, value)
        return [job.id for job in unfinished], True


def priority_of(text: str) -> int:
    """`low`, `normal`, `high`, or 0 to 100. Raises BadInput."""
    if text in PRIORITIES:
        return PRIORITIES[text]
    if text.isdecimal() and int(text) <= 100:
        return int(text)
    raise BadInput(f"priority: {text} is none; write {', '.join(PRIORITIES)}, or a number from 0 to 100")


def _do(store: Store, job: JobRow, kind: RequestKind, who: str, value: Any) -> None:
    """Nobody else writes now. A job that a killed controller left under way goes back to the queue."""
    match kind:
        case "cancel":
            _cancel(store, job, who)
        case "pause":
            store.switch_status(job.id, Reason.PAUSED_BY_USER, f"by {who}", who=who)
        case "resume":
            if job.status is Status.WAITING and job.reason is Reason.PAUSED_BY_USER:
                store.switch_status(job.id, Reason.RESUMED_BY_USER, f"by {who}", who=who)
        case "priority":
            store.set_priority(job.id, int(value), who)


def _cancel(store: Store, job: JobRow, who: str) -> None:
    """Jobs that depend on this one can no longer succeed."""
    store.switch_status(job.id, Reason.CANCELLED_BY_USER, f"by {who}", who=who)
    for other in store.unfinished_jobs(job.run):
        if job.id in other.depends_on:
            store.switch_status(other.id, Reason.PARENT_FAILED, job.id, who=who)
