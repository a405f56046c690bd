"""How far the jobs of a run are, read from the store, as a person watching wants it. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.api.views import STAGES, why
from orchestrator.control.show import read_progress
from orchestrator.control.submission import Order, read_order
from orchestrator.job import Status
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store


@dataclass(frozen=True)
class JobProgress:
    """One job at one moment."""

    name: str
    task: str
    status: Status
    doing: str
    """The stage of one that runs, and for any other why it does not."""
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    """Of training, at the pace seen since this attempt began; None before a step was seen."""
    counted: str = ""
    """What is done one by one, and how far that is: `fuse 120/224`."""

    @property
    def training(self) -> bool:
        return self.status is Status.RUNNING and self.doing == STAGES["train"]

    @property
    def steps(self) -> str:
        return self.counted or (f"{self.step}/{self.num_steps}" if self.num_steps else "")


class RunProgress:
    """Looks at one run again and again, and remembers how fast its jobs went."""

    def __init__(self, store: Store, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._run = run
        self._clock = clock
        self._orders: dict[str, Order] = {}
        self._first_seen: dict[tuple[str, int], tuple[float, int]] = {}

    def look(self) -> tuple[JobProgress, ...]:
        jobs = self._store.jobs(self._run)
        for job in jobs:
            self._orders.setdefault(job.id, read_order(job.plan))
        steps = {step.id for order in self._orders.values() for step in order.job.steps}
        finished, counts = self._store.steps.finished(steps), read_progress(self._store)
        return tuple(
            self._progress(job, self._orders[job.id], finished, counts.get(job.id, {})) for job in jobs
        )

    def _progress(
        self, job: JobRow, order: Order, finished: set[str], count: Mapping[str, Any]
    ) -> JobProgress:
        stage = next((STAGES[step.kind] for step in order.job.steps if step.id not in finished), "")
        training = job.status is Status.RUNNING and stage == STAGES["train"]
        return JobProgress(
            name=job.name,
            task=order.job.task,
            status=job.status,
            doing=stage if job.status in (Status.RUNNING, Status.STOPPING) and stage else why(job),
            step=job.step,
            num_steps=job.num_steps or (order.job.estimate.num_steps if order.job.estimate else None),
            loss=job.loss,
            tokens_per_second=job.tokens_per_second,
            seconds_left=self._seconds_left(job) if training else None,
            counted=f"{count['step']} {count['done']}/{count['total']}" if count else "",
        )

    def _seconds_left(self, job: JobRow) -> float | None:
        now = self._clock()
        began, first = self._first_seen.setdefault((job.id, job.attempt), (now, job.step))
        if job.num_steps is None or job.step <= first:
            return None
        return (job.num_steps - job.step) * (now - began) / (job.step - first)
