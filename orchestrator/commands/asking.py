"""`cancel`, `pause`, `resume`, `priority`: one request each, and what became of it in a line."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from orchestrator.api.service import Service
from orchestrator.store.rows import RequestKind

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


def ask(service: Service, kind: RequestKind, reference: str, out: Console, value: Any = None) -> None:
    """For one job, or all jobs of a run. Raises NoSuchJob, BadInput."""
    found = service.change(reference, kind, value)
    names = ", ".join(found["jobs"])
    if not names:
        out.print(f"{reference} has finished already")
    elif found["done"]:
        out.print(f"{DONE[kind]} {names}", soft_wrap=True)
    else:
        out.print(f"asked the run at work to {ASKED[kind]} {names}", soft_wrap=True)
