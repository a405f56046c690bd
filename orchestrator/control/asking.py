"""What is asked for a step beside hosts and tasks: of the registry, and of the object store of checkpoints.

Asked on an errand's thread; the answer is taken in by a later round, and what it raised becomes the job's
status.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from orchestrator.control.curve_export import Backoff
from orchestrator.control.errands import Errands
from orchestrator.control.work import Work
from orchestrator.job import Reason
from orchestrator.plan.steps import Step
from orchestrator.store.rows import JobRow

T = TypeVar("T")
Guard = Callable[[str], AbstractContextManager[None]]
"""Under which something is done for a job: what it raises becomes the job's status."""


class Asking:
    def __init__(self, work: Work, errands: Errands, registry_backoff: Backoff, guard: Guard) -> None:
        self._work = work
        self._errands = errands
        self._backoff = registry_backoff
        self._guard = guard

    def registry_away(self, job: JobRow) -> bool:
        """Whether it is not to be tried yet; a job that wants it then waits."""
        if self._backoff.away:
            self._work.switch(job.id, Reason.REGISTRY_AWAY)
        return self._backoff.away

    def free(self, lanes: Set[str]) -> bool:
        return self._errands.free(lanes)

    def registry(
        self, job: JobRow, step: Step, lanes: Set[str], ask: Callable[[], T], take_in: Callable[[T], Any]
    ) -> None:
        """Have something done by the registry for a step, if there is a way; else it is tried again."""

        def answered(found: T) -> None:
            self._backoff.worked()
            take_in(found)

        self._ask(job, step, lanes, ask, answered)

    def bring(self, job: JobRow, step: Step, adapters: Set[str]) -> bool:
        """Whether what other steps have made is in this home; if not, the object store is asked for it."""
        ledger = self._work.ledger
        gone = sorted(adapter for adapter in adapters if ledger.elsewhere(adapter))
        if gone:
            lanes = {f"adapter {adapter}" for adapter in gone}
            fetch = partial(_each, ledger.fetch, gone)
            self._ask(job, step, lanes, fetch, lambda _: self._work.found_room(job.id))
        return not gone

    def _ask(
        self, job: JobRow, step: Step, lanes: Set[str], ask: Callable[[], T], take_in: Callable[[T], Any]
    ) -> None:
        if self._errands.free(lanes):
            self._work.depart(step, job, "registry")
            self._errands.begin(lanes, ask, partial(self._answered, step.id, job.id, take_in))

    def _answered(self, step: str, job: str, take_in: Callable[[T], Any], answer: Future[T]) -> bool:
        del self._work.flights[step]
        with self._guard(job):
            take_in(answer.result())
        return True


def _each(fetch: Callable[[str], None], adapters: Sequence[str]) -> None:
    for adapter in adapters:
        fetch(adapter)
