"""How a job goes from one step to the next: what is asked of a host, of a CPU task, of the registry.

Steps of a job are done in order, one at a time. Nothing here decides who goes first: `scheduler` does.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from orchestrator.contracts import TaskResult
from orchestrator.control.asking import Asking, Guard
from orchestrator.control.curve_export import Backoff
from orchestrator.control.errands import Errands
from orchestrator.control.fleet import Host
from orchestrator.control.ledger import Ledger
from orchestrator.control.registration import Registration
from orchestrator.control.submission import NEEDS, Order
from orchestrator.control.work import Flight, Work
from orchestrator.job import Reason, Status
from orchestrator.plan.steps import (
    EvaluateWhat,
    FuseWhat,
    PromoteWhat,
    ReleaseWhat,
    SearchWhat,
    Step,
    TrainWhat,
    made_adapters,
    registered_adapters,
)
from orchestrator.policy import DEFAULT_TEAM
from orchestrator.queue import Need, Waiting
from orchestrator.store.rows import JobRow
from workers.types import Attach, Command, Evaluate, ExportTask, FuseTask, SearchSpec, SearchWeights, Task

PAUSED = (Reason.DISK_FULL, Reason.CHECKPOINTS_AWAY, Reason.WAITS_FOR_MEMORY)
"""Of jobs that are tried again after a pause: what they found no room for, they may later."""


class Steps:
    """Carries jobs through their steps."""

    def __init__(
        self,
        work: Work,
        registration: Registration,
        errands: Errands,
        registry_backoff: Backoff,
        guard: Guard,
    ) -> None:
        self._work = work
        self._ledger: Ledger = work.ledger
        self._registration = registration
        self._asking = Asking(work, errands, registry_backoff, guard)
        self._backoff = registry_backoff
        self._guard = guard
        self._fetched: dict[tuple[str, int], dict[str, str]] = {}
        """(job, attempt) -> NAME@REF -> folder, for what is asked for next."""

    def keep_only(self, jobs: Container[str]) -> None:
        """Forget what was fetched for other jobs; its files stay."""
        self._fetched = {key: found for key, found in self._fetched.items() if key[0] in jobs}

    def advance(self, job: JobRow) -> Waiting | None:
        """Do what can be done for a job now; what it waits for, if that is the scheduler's to give."""
        order = self._work.order(job.id)
        remaining = self._ledger.remaining(order)
        if job.status is Status.WAITING:
            return self._wants(job, order, remaining)
        if not remaining:
            return self._succeed(job)
        if remaining[0].id in self._work.flights:
            return None
        return self._next(job, order, remaining)

    def _next(self, job: JobRow, order: Order, remaining: tuple[Step, ...]) -> Waiting | None:
        need = order.seat_need(remaining)
        host = self._work.fleet.host_of(job.id)
        if need is Need.NOTHING:
            return self._speak_to_registry(job, order, remaining)
        if need is Need.CPU or host is None or (need is Need.SLOT and job.id not in host.residents):
            self._work.leave(job.id)
            return self._wants(job, order, remaining)
        if host.ready is not None:
            self._send_all(job, order, remaining, host)
        return None

    def _wants(self, job: JobRow, order: Order, remaining: tuple[Step, ...]) -> Waiting | None:
        if job.reason is Reason.PAUSED_BY_USER:
            return None
        if job.reason is Reason.REGISTRY_AWAY and self._backoff.away:
            return None
        if job.reason in PAUSED and self._work.pauses(job.id):
            return None
        if self._work.still_seated(job.id):
            return None  # It was told to leave, and goes on from what it saves on the way out.
        need = order.seat_need(remaining)
        if remaining and remaining[0].id in self._work.flights:
            other = self._work.flights[remaining[0].id].job
            if other != job.id:
                self._work.switch(job.id, Reason.WAITS_FOR_HOST, f"{other} is doing the same work for both")
            return None
        planned = order.job
        return Waiting(
            job.id,
            need,
            planned.host_key,
            planned.world_size,
            planned.base.slots,
            job.priority,
            job.submitted_at,
            tuple(self._work.parents[parent] for parent in job.depends_on),
            planned.estimate.adapter_parameters if planned.estimate else 0,
            planned.team or DEFAULT_TEAM,
            self._work.books.attained.get(job.id, 0.0),
            self._work.books.remaining(job),
        )

    def _succeed(self, job: JobRow) -> None:
        self._work.leave(job.id)
        if job.status is not Status.STOPPING:
            self._work.switch(job.id, Reason.STEPS_DONE)
        self._work.switch(job.id, Reason.DONE)

    # ---- on a host -------------------------------------------------------------------------------------

    def _send_all(self, job: JobRow, order: Order, remaining: tuple[Step, ...], host: Host) -> None:
        """The next step; if it is to score, all that is to be scored next: a host does that together."""
        scores = takewhile(lambda step: isinstance(step.what, EvaluateWhat), remaining)
        asked = [step for step in scores if step.id not in self._work.flights] or [remaining[0]]
        if not self._at_hand(job, order, asked):
            return
        # All are made before one is sent: a folder that is lost keeps all back.
        for step, command in [(step, self._command(job, step)) for step in asked]:
            self._work.depart(step, job, "host", host.name)
            self._work.cluster.send(host.name, command)
        self._fetched.pop((job.id, job.attempt), None)
        if job.status is Status.STARTING and not isinstance(remaining[0].what, TrainWhat):
            self._work.switch(job.id, Reason.ATTACHED)

    def _command(self, job: JobRow, step: Step) -> Command:
        if isinstance(step.what, TrainWhat):
            folder = str(self._ledger.checkpoint_dir(step.id))
            url = self._ledger.checkpoint_url(step.id)
            return Attach(step.what.attempt(job.id, job.attempt, folder, partial(self._folder, job), url))
        if isinstance(step.what, SearchWhat):
            return SearchWeights(step.id, self._search(job, step.id, step.what))
        assert isinstance(step.what, EvaluateWhat), f"a host does not do {step.kind}"
        adapter = step.what.adapter
        folder = None if adapter is None else self._folder(job, adapter)
        return Evaluate(step.id, folder, step.what.evaluation)

    def _search(self, job: JobRow, step: str, what: SearchWhat) -> SearchSpec:
        plan = self._fuse_task(job, what.fuse, step)
        folder = str(self._ledger.search_dir(step))
        return SearchSpec(plan, what.tasks, what.trials, folder, what.groups, what.seed)

    def _fuse_task(self, job: JobRow, what: FuseWhat, step: str) -> FuseTask:
        return FuseTask(
            adapter_dirs=tuple(self._folder(job, adapter) for adapter, _ in what.adapters),
            weights=tuple(weight for _, weight in what.adapters),
            rule=what.rule,
            rank=what.rank,
            options=what.options,
            out_dir=str(self._ledger.fusion_dir(step)),
        )

    def _folder(self, job: JobRow, adapter: str) -> str:
        """The verified folder of a step's adapter, or of a registered one that is at hand."""
        if "@" in adapter:
            return self._fetched[job.id, job.attempt][adapter]
        return str(self._ledger.adapter_dir(adapter))

    # ---- on a CPU --------------------------------------------------------------------------------------

    def start_task(self, job: JobRow) -> None:
        """Run the job's next step as a CPU task."""
        order = self._work.order(job.id)
        step = self._ledger.remaining(order)[0]
        if not self._at_hand(job, order, [step]):
            return
        task = self._task(job, order, step)
        self._work.depart(step, job, "task")
        self._work.cluster.submit_task(step.id, task)
        self._fetched.pop((job.id, job.attempt), None)
        if job.status is Status.STARTING:
            self._work.switch(job.id, Reason.ATTACHED)

    def _task(self, job: JobRow, order: Order, step: Step) -> Task:
        if isinstance(step.what, FuseWhat):
            return self._fuse_task(job, step.what, step.id)
        assert isinstance(step.what, ReleaseWhat), f"no task does {step.kind}"
        base = order.job.base
        return ExportTask(
            adapter_dir=self._folder(job, order.registered.adapter),
            base_path=base.path,
            merged=step.what.merged,
            out_dir=step.what.out,
            extra_files=(
                ("README.md", self._registration.released_card(order)),
                ("recipe.yaml", order.registered.recipe_yaml),
            ),
            dtype=base.dtype,
            name=self._registration.registered_label(order),
        )

    def hear_tasks(self) -> bool:
        """Take in how far CPU tasks are, and every one that has ended; whether one has."""
        heard = False
        for key, flight in list(self._work.flights.items()):
            result = self._work.cluster.task_result(key) if flight.of == "task" else None
            if flight.of == "task" and (progress := self._work.cluster.task_progress(key)):
                self._work.progress[key] = progress
            if result is not None:
                del self._work.flights[key]
                self._work.cluster.forget_task(key)
                heard = True
                with self._guard(flight.job):
                    self._task_ended(flight, result)
        return heard

    def _task_ended(self, flight: Flight, result: TaskResult) -> None:
        step = flight.step
        if result.error is None:
            self._ledger.finish(step.id, step.kind, flight.job, self._task_result(step, result.value))
        elif self._work.present(flight.job, flight.attempt):
            refused = Reason.FUSION_REFUSED if step.kind == "fuse" else Reason.RELEASE_REFUSED
            reason = refused if result.refused else Reason.INTERNAL_ERROR
            if result.disk_full:
                self._work.disk_full(flight.job, self._out_dir(step), result.error)
            else:
                self._work.switch(flight.job, reason, result.error)

    def _out_dir(self, step: Step) -> Path:
        return Path(step.what.out) if isinstance(step.what, ReleaseWhat) else self._ledger.fusion_dir(step.id)

    def _task_result(self, step: Step, value: Mapping[str, Any]) -> dict[str, Any]:
        if step.kind == "fuse":
            return self._ledger.adapter_result(self._ledger.fusion_dir(step.id), report=value)
        return dict(value)

    # ---- with the registry -----------------------------------------------------------------------------

    def _speak_to_registry(self, job: JobRow, order: Order, remaining: tuple[Step, ...]) -> None:
        """Have one registry step done; before an adapter is registered, its curve is told to the end."""
        self._work.leave(job.id)
        if self._asking.registry_away(job):
            return
        if job.status is not Status.STOPPING and all(NEEDS[s.kind] is Need.NOTHING for s in remaining):
            self._work.switch(job.id, Reason.STEPS_DONE)
        step, curves = remaining[0], self._registration.curves
        done = partial(self._ledger.finish, step.id, step.kind, job.id)
        name, series = f"name {order.registered.name}", order.series
        if isinstance(step.what, PromoteWhat):
            promote = partial(self._registration.promote, order, step.what)
            self._asking.registry(job, step, {name}, promote, done)
        elif not self._asking.free({name, series}):
            return
        elif curves.behind(order):
            sent = partial(curves.sent, order)
            self._asking.registry(job, step, {series}, partial(curves.send, order), sent)
        else:
            register = partial(self._registration.register, order, step.id)
            self._asking.registry(job, step, {name, series}, register, done)

    def _at_hand(self, job: JobRow, order: Order, steps: Sequence[Step]) -> bool:
        """Whether the adapters that steps read are here; if not, they are asked for."""
        if not self._asking.bring(job, steps[0], _made(order, steps)):
            return False
        wanted = frozenset[str]().union(*(registered_adapters(step.what) for step in steps))
        if wanted <= self._fetched.get((job.id, job.attempt), {}).keys():
            return True
        if not self._asking.registry_away(job):
            fetched = partial(self._fetched.__setitem__, (job.id, job.attempt))
            lanes = {order.adapters[name] for name in wanted}
            fetch = partial(self._registration.fetch, order, wanted)
            self._asking.registry(job, steps[0], lanes, fetch, fetched)
        return False


def _made(order: Order, steps: Sequence[Step]) -> frozenset[str]:
    """The steps of whose adapters these read the files."""
    made = frozenset[str]().union(*(made_adapters(step.what) for step in steps))
    released = any(isinstance(step.what, ReleaseWhat) for step in steps)
    return made | {order.registered.adapter} if released else made
