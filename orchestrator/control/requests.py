"""What people ask for a job that a controller has in hand: cancel, pause, resume, another priority."""

from __future__ import annotations

from orchestrator.control.work import Work
from orchestrator.job import Reason
from orchestrator.store.rows import Request


def grant(work: Work, request: Request) -> None:
    """Do it; who asked is kept in the event. A pause detaches a job: base and steps stay."""
    job, who = request.job, request.who
    match request.kind:
        case "cancel":
            work.switch(job, Reason.CANCELLED_BY_USER, f"by {who}", who=who)
        case "pause":
            work.switch(job, Reason.PAUSED_BY_USER, f"by {who}", who=who)
        case "resume":
            if work.jobs[job].reason is Reason.PAUSED_BY_USER:
                work.switch(job, Reason.RESUMED_BY_USER, f"by {who}", who=who)
        case "priority":
            work.set_priority(job, int(request.value), who)
