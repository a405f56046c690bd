"""`explain JOB`: why it waits, who goes first, what would have to be freed, when it may start and end.

The words for a waiting job come from the code that decides, on the snapshot that it decided on.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from rich.console import Console

from orchestrator.commands.home import Home
from orchestrator.commands.jobs import find_job, open_store
from orchestrator.commands.output import Format, duration, emit, moment
from orchestrator.commands.parts import Parts
from orchestrator.commands.progress import why
from orchestrator.commands.queue_view import seconds_left
from orchestrator.control.show import read_snapshot
from orchestrator.explain import Explanation
from orchestrator.explain import explain as explained
from orchestrator.job import Status
from orchestrator.scheduler import schedule
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store


def explain(parts: Parts, home: Home, reference: str, format: Format) -> None:
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        job = find_job(store, reference)
        found, decided_at = explanation(store, job)
        value = {
            **{"job": job.id, "status": job.status.value, "decided_at": decided_at},
            **asdict(found),
            "at_work": home.claimed(),
        }
        emit(value, format, lambda out: _print(out, job, found, value))


def explanation(store: Store, job: JobRow) -> tuple[Explanation, float | None]:
    """Of a waiting job by the scheduler; of any other by its status. And when it was decided."""
    if job.status is Status.WAITING:
        shown = read_snapshot(store)
        if shown is not None and job.id in {waiting.job for waiting in shown[0].waiting}:
            snapshot, at = shown
            return explained(snapshot, schedule(snapshot), job.id), at
    return _by_status(store, job), None


def _by_status(store: Store, job: JobRow) -> Explanation:
    left = seconds_left(store, job)
    end = time.time() + left if left is not None else job.finished_at
    sentence = f"It is {job.status}: {why(job)}."
    if job.status is Status.WAITING:
        sentence = (
            f"No controller has looked at it yet: {why(job)}." if not job.attempt else f"It {why(job)}."
        )
    return Explanation(job.id, sentence, None, (), (), job.started_at, end)


def _print(out: Console, job: JobRow, found: Explanation, value: dict[str, Any]) -> None:
    out.print(f"{job.id}: {found.sentence}", soft_wrap=True)
    if found.ahead:
        out.print(f"ahead of it: {', '.join(found.ahead)}", soft_wrap=True)
    for words in found.to_free:
        out.print(f"to be freed: {words}", soft_wrap=True)
    if found.expected_start is not None and job.status is Status.WAITING:
        out.print(f"may start {moment(found.expected_start)}")
    if found.expected_end is not None and not job.status.finished:
        left = duration(max(0.0, found.expected_end - time.time()))
        out.print(f"its training may end {moment(found.expected_end)}, in {left}", soft_wrap=True)
    if not value["at_work"] and not job.status.finished:
        out.print("nobody works here now; `chorus serve` does", soft_wrap=True)
