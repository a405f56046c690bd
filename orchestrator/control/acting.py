"""What a decision says is done: hosts closed and opened, jobs paused, seated, begun or refused."""

from __future__ import annotations

from collections.abc import Container, Mapping

from orchestrator.control.guard import Guard
from orchestrator.control.steps import Steps
from orchestrator.control.work import Work
from orchestrator.job import Reason, Status
from orchestrator.placement import NewHost
from orchestrator.queue import Waiting
from orchestrator.scheduler import Decision
from orchestrator.store.rows import JobRow
from workers.types import BadInput

TOO_LARGE_PATIENCE = 30.0
"""Seconds a job that needs more ranks than the cluster shows stays queued: a node may be just coming up."""


class Acting:
    def __init__(self, work: Work, steps: Steps, guard: Guard) -> None:
        self._work = work
        self._steps = steps
        self._guard = guard
        self._too_large_since: dict[str, float] = {}

    def keep_only(self, jobs: Container[str]) -> None:
        """Forget what is held of other jobs."""
        since = self._too_large_since.items()
        self._too_large_since = {job: at for job, at in since if job in jobs}

    def act(self, decision: Decision, asked: Mapping[str, Waiting]) -> None:
        """`asked`: what waits, by job."""
        self._preempt(decision.preempt)
        for name in decision.close_hosts:
            self._work.drop_flights(self._work.fleet.stop(name))
        for new in decision.start_hosts:
            self._open(new, [job for job, host in decision.placements.items() if host == new.name])
        for job, host in decision.placements.items():
            if job in self._work.jobs:
                row = self._begin(job, host)
                parameters = asked[job].adapter_parameters
                self._work.fleet.seat(job, row.attempt, host, asked[job].need, parameters)
        for job in decision.start_tasks:
            with self._guard(job):
                self._steps.start_task(self._begin(job, None))
        for job in decision.free:
            self._begin(job, None, "needs no host any more")
        for job, reason in decision.refusals.items():
            self._refuse(self._work.jobs[job], reason, asked[job])

    def _preempt(self, victims: Mapping[str, str]) -> None:
        """Pause them. On record first: a controller killed in between must know that they are spared now."""
        work, now = self._work, self._work.clock()
        for victim in victims:
            work.books.preempted_at[victim] = now
        if victims:
            work.books.write(now, at_once=True)
        for victim, taker in victims.items():
            if victim in work.jobs:
                work.switch(victim, Reason.PREEMPTED, f"for {taker}")

    def _open(self, new: NewHost, jobs: list[str]) -> None:
        """Start a host for the jobs placed on it; they fail if the cluster can never hold one."""
        on_gpus = self._work.cluster.capacity().gpus > 0
        try:
            self._work.fleet.start(new, self._work.order(jobs[0]).job.base, on_gpus)
        except BadInput as error:
            for job in jobs:
                self._work.switch(job, Reason.TOO_LARGE, str(error))

    def _begin(self, job: str, host: str | None, message: str = "") -> JobRow:
        """A new attempt for a job that waits; one that runs already goes on with what it was given."""
        row = self._work.jobs[job]
        self._too_large_since.pop(job, None)
        if row.status is not Status.WAITING:
            return row
        return self._work.switch(job, Reason.PLACED, message, host=host)

    def _refuse(self, job: JobRow, reason: Reason, asked: Waiting) -> None:
        message = ""
        if reason is Reason.TOO_LARGE:
            message = f"it needs {asked.world_size} ranks"
            since = self._too_large_since.setdefault(job.id, self._work.clock())
            if self._work.clock() - since < TOO_LARGE_PATIENCE:
                reason = Reason.WAITS_FOR_HOST
        if reason is Reason.OUT_OF_MEMORY:
            message = f"a host of its base has no room for {asked.adapter_parameters:,} adapter parameters"
        if reason is Reason.PARENT_FAILED:
            failed = [p for p in job.depends_on if self._work.parents[p] in (Status.FAILED, Status.CANCELLED)]
            message = ", ".join(failed)
        self._work.switch(job.id, reason, message)
