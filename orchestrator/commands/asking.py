"""`cancel`, `pause`, `resume`, `priority`: asked of the controller at work, else done here."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console

from orchestrator.commands.home import Home, HomeBusy
from orchestrator.commands.jobs import find_jobs, open_store
from orchestrator.commands.parts import Parts
from orchestrator.commands.submit import user
from orchestrator.job import Reason, Status
from orchestrator.recipe.parts import PRIORITIES
from orchestrator.store.rows import JobRow, RequestKind
from orchestrator.store.store import Store
from workers.types import BadInput

DONE: dict[RequestKind, str] = {
    "cancel": "cancelled",
    "pause": "paused",
    "resume": "resumed",
    "priority": "gave another priority to",
}
ASKED: dict[RequestKind, str] = {
    "cancel": "cancel",
    "pause": "pause",
    "resume": "resume",
    "priority": "give another priority to",
}


def ask(parts: Parts, home: Home, kind: RequestKind, reference: str, out: Console, value: Any = None) -> None:
    """For one job, or all jobs of a run. Raises NoSuchJob, BadInput."""
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        jobs = [job for job in find_jobs(store, reference) if not job.status.finished]
        if not jobs:
            out.print(f"{reference} has finished already")
            return
        names = ", ".join(job.id for job in jobs)
        try:
            stack.enter_context(home.claim())
        except HomeBusy:
            for job in jobs:
                store.request(job.id, kind, user(), value)
            out.print(f"asked the run at work to {ASKED[kind]} {names}", soft_wrap=True)
            return
        for job in reversed(jobs):
            _do(store, job, kind, value)
        out.print(f"{DONE[kind]} {names}", soft_wrap=True)


def priority_of(text: str) -> int:
    """`low`, `normal`, `high`, or 0 to 100. Raises BadInput."""
    if text in PRIORITIES:
        return PRIORITIES[text]
    if text.isdecimal() and int(text) <= 100:
        return int(text)
    raise BadInput(f"priority: {text} is none; write {', '.join(PRIORITIES)}, or a number from 0 to 100")


def _do(store: Store, job: JobRow, kind: RequestKind, value: Any) -> None:
    """Nobody else writes now. A job that a killed controller left under way goes back to the queue."""
    who = user()
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
