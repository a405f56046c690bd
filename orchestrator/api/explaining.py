"""Why a job waits, by the code that decides, on the snapshot that it decided on."""

from __future__ import annotations

import time

from orchestrator.api.queue_view import seconds_left
from orchestrator.api.views import why
from orchestrator.control.show import read_snapshot
from orchestrator.explain import Explanation
from orchestrator.explain import explain as explained
from orchestrator.job import Status
from orchestrator.scheduler import schedule
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store


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
