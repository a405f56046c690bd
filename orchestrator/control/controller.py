"""The loop: hear what happened, move every job on, decide, act. One synchronous thread.

The registry alone is spoken to beside it (`errands`).

Everything it holds in memory can be lost at any moment: the store has every status and every finished step,
hosts find their newest checkpoint, and each step may be done twice. Knows `Cluster` and `Registry` as
Protocols.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from orchestrator.contracts import Cluster, ClusterUnreachable, NoSuchVersion, Registry, RegistryUnreachable
from orchestrator.control import picture
from orchestrator.control.adoption import adopt
from orchestrator.control.curve_export import Backoff, CurveExport
from orchestrator.control.errands import Errands, Start, on_a_thread
from orchestrator.control.host_events import hear
from orchestrator.control.ledger import LostFolder
from orchestrator.control.pace import TICK_SECONDS, Pace
from orchestrator.control.registration import GateFailed, Registration
from orchestrator.control.requests import grant
from orchestrator.control.show import Board
from orchestrator.control.steps import Steps
from orchestrator.control.work import Work
from orchestrator.disk import is_full, scarce
from orchestrator.job import Reason, Status
from orchestrator.placement import NewHost
from orchestrator.policy import Policy
from orchestrator.queue import Waiting, parents_verdict
from orchestrator.recipe.teams import PolicyFile
from orchestrator.scheduler import Decision, schedule
from orchestrator.store.engine import StoreUnreachable
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from orchestrator.who import user_at_machine
from workers.types import BadInput, CheckpointsAway, Superseded

DECIDE_SECONDS = 1.0
"""What depends on the clock alone (waits, shares, idle hosts) is looked at so often."""
LET_GO_SECONDS = 30.0
CLOSE_SECONDS = 15.0
"""Given to the registry at the end: for what it was asked, and again for the last points of curves."""
TOO_LARGE_PATIENCE = 30.0
"""Seconds a job that needs more ranks than the cluster shows stays queued: a node may be just coming up."""

log = logging.getLogger(__name__)


class Controller:
    """Runs the jobs of one run, or (`run` None) all that the store holds. One controller a store."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        registry: Registry,
        home: Path,
        run: str | None = None,
        clock: Callable[[], float] = time.time,
        start: Start = on_a_thread,
        checkpoints: str = "",
    ) -> None:
        """`start` has done what is asked of the registry; `checkpoints` as in `Ledger`."""
        self._home = home = home.resolve()
        self._run = run
        self._backoff = Backoff(clock)
        self._work = work = Work(store, cluster, home, clock, checkpoints)
        self._errands = Errands(start)
        self._curves = CurveExport(store, registry, self._errands, self._backoff, clock)
        registration = Registration(registry, work.ledger, self._curves, home)
        self._steps = Steps(work, registration, self._errands, self._backoff, self._guard)
        self._policy = PolicyFile(home / "teams.yaml")
        self._board = Board(work, home)
        self._pace = Pace(clock)
        self._decided_at = float("-inf")
        self._redone: set[str] = set()
        self._too_large_since: dict[str, float] = {}

    def run(
        self,
        on_tick: Callable[[], None] = lambda: None,
        wait: Callable[[float], None] = time.sleep,
        until: str | None = None,
        forever: bool = False,
    ) -> None:
        """Until every job, or every one of run `until`, has finished and left its host; or `forever`.

        Raises ClusterUnreachable, StoreUnreachable; what is done so far stays done. Raises Superseded when
        another controller has taken over: hosts and jobs are its own then, and left as they are.
        """
        self.recover()
        try:
            while self.tick() or forever:
                if until is not None and not self._at_work(until):
                    self._let_go(wait)
                    break
                on_tick()
                self.rest(wait)
        except Superseded:
            raise
        except BaseException:
            self.close()
            raise
        self.close()

    def rest(self, wait: Callable[[float], None] = time.sleep) -> None:
        """Until the next round is due."""
        awaited = any(flight.step.kind != "train" for flight in self._work.flights.values())
        hosts = self._work.fleet.hosts
        loading = any(host.ready is None for host in hosts)
        pause = self._pace.pause(sum(len(host.residents) for host in hosts), awaited or loading)
        self._pace.rest(pause, wait, self._work.news)

    def _let_go(self, wait: Callable[[float], None]) -> None:
        """Jobs of other runs save what they have, for whoever works next."""
        work, deadline = self._work, self._work.clock() + LET_GO_SECONDS
        for job in [job for job in work.jobs.values() if job.status is not Status.WAITING]:
            work.switch(job.id, Reason.INTERRUPTED)
        while any(host.residents for host in work.fleet.hosts) and work.clock() < deadline:
            for host in work.fleet.hosts:
                hear(work, host)
            wait(TICK_SECONDS)

    def _at_work(self, run: str) -> bool:
        """Whether a job of that run is unfinished or still seated."""
        seated = {job for host in self._work.fleet.hosts for job in host.seated}
        return any(job.run == run for job in self._work.jobs.values()) or any(
            self._work.run_of(job) == run for job in seated
        )

    def recover(self) -> None:
        """Take over the hosts that outlived the last controller; queue again what else it left under way.

        Call once, before the first tick.
        """
        going = adopt(self._work, self._run, f"{user_at_machine()} ({os.getpid()})")
        self._requeue(Reason.CONTROLLER_RESTARTED, going)
        self._work.ended += self._work.store.ended_with_series(self._work.store.curves.pending())

    def tick(self) -> bool:
        """One round; False when every job has finished and has left its host.

        Nothing is decided anew while nothing has changed but steps and the clock, for a second at most.
        """
        work = self._work
        changed = work.refresh(self._run)
        changed |= self._heed_requests()
        for host in work.fleet.hosts:
            changed |= hear(work, host)
        changed |= self._steps.hear_tasks()
        self._board.show_progress()
        changed |= self._errands.hear()
        if changed:
            self._pace.changed()
        if changed or not 0 <= work.clock() - self._decided_at < DECIDE_SECONDS:
            self._decide()
        self._curves.tick([work.order(job) for job in work.jobs])
        self._end_runs()
        return bool(work.jobs) or any(host.residents for host in work.fleet.hosts)

    def _decide(self) -> None:
        done = self._work.ledger.changes
        self._stop_overdue()
        waiting = self._advance()
        policy = self._policy.read()
        self._keep_books(waiting, policy)
        snapshot = picture.snapshot(self._work, policy, waiting)
        decision = schedule(snapshot)
        self._act(decision, {job.job: job for job in waiting})
        self._board.show(snapshot, decision)
        self._forget()
        settled = done == self._work.ledger.changes and not decision.moves
        self._decided_at = self._work.clock() if settled else float("-inf")

    def close(self) -> None:
        """Stop the hosts, queue what was under way, and export what can still be exported."""
        self._work.fleet.stop_all()
        self._errands.finish(CLOSE_SECONDS)
        self._work.books.write(self._work.clock(), at_once=True)
        self._requeue(Reason.INTERRUPTED)
        self._board.clear()
        self._end_runs()
        self._curves.close([self._work.order(job) for job in self._work.jobs])
        self._errands.finish(CLOSE_SECONDS)

    def _requeue(self, reason: Reason, going: frozenset[str] = frozenset()) -> None:
        for job in self._work.store.unfinished_jobs(self._run):
            if job.status is not Status.WAITING and job.id not in going:
                self._work.store.switch_status(job.id, reason)

    # ---- moving on -------------------------------------------------------------------------------------

    def _heed_requests(self) -> bool:
        """Whether there were any."""
        requests = self._work.store.open_requests()
        for request in requests:
            if request.job in self._work.jobs:
                grant(self._work, request)
            elif not self._work.store.job(request.job).status.finished:
                continue
            self._work.store.close_request(request.id)
        return bool(requests)

    def _stop_overdue(self) -> None:
        """A job's time runs while it is under way, not while it waits; its last checkpoint stays."""
        work = self._work
        work.books.holds((job for job in work.jobs if not work.waits(job)), work.clock())
        for job in list(work.jobs.values()):
            most = work.order(job.id).job.max_duration
            if most is not None and work.books.held.get(job.id, 0.0) > most:
                work.switch(job.id, Reason.OUT_OF_TIME, f"after step {job.step}")

    def _advance(self) -> list[Waiting]:
        waiting: list[Waiting] = []
        for job in list(self._work.jobs.values()):
            with self._guard(job.id):
                asked = self._steps.advance(job)
                waiting += [asked] if asked else []
        return waiting

    def _end_runs(self) -> None:
        """Tell the registry of jobs that ended without a version; once it is not asked for one any more."""
        asked = {flight.job for flight in self._work.flights.values() if flight.of == "registry"}
        ended = [job for job in self._work.ended if job.id not in asked]
        self._work.ended = [job for job in self._work.ended if job.id in asked]
        for job in ended:
            order = self._work.readable(job.id)
            if job.status is not Status.SUCCEEDED and order and not self._work.ledger.registered(order):
                self._curves.end(order, "KILLED" if job.status is Status.CANCELLED else "FAILED")

    def _keep_books(self, waiting: list[Waiting], policy: Policy) -> None:
        work, now = self._work, self._work.clock()
        work.books.keep_only(work.jobs)
        work.books.waits({job.job for job in waiting if parents_verdict(job) is None}, now)
        work.books.charge(work.fleet.hosts, picture.teams_aboard(work), now, policy.half_life)
        work.books.write(now)

    def _forget(self) -> None:
        """A controller may work for months: nothing is kept of a job that has ended."""
        work = self._work
        if work.forget():
            self._steps.keep_only(work.jobs)
            self._curves.keep_only(work.orders)
            since = self._too_large_since.items()
            self._too_large_since = {job: at for job, at in since if job in work.jobs}

    # ---- acting ----------------------------------------------------------------------------------------

    def _act(self, decision: Decision, asked: Mapping[str, Waiting]) -> None:
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

    # ---- what can go wrong with one job ----------------------------------------------------------------

    @contextmanager
    def _guard(self, job: str) -> Generator[None]:
        """One job's failure is its own: it gets a status and a reason, and the loop goes on."""
        try:
            yield
        except (SQLAlchemyError, StoreUnreachable, ClusterUnreachable, Superseded):
            raise
        except RegistryUnreachable as error:
            self._backoff.failed()
            self._stop(job, Reason.REGISTRY_AWAY, f"{error}{scarce(self._home)}")
        except GateFailed as error:
            self._stop(job, Reason.GATE_FAILED, str(error))
        except (BadInput, NoSuchVersion) as error:
            self._stop(job, Reason.BAD_DATA, str(error))
        except LostFolder as error:
            self._redo(job, error)
        except CheckpointsAway as error:
            if job in self._work.jobs:
                self._work.pause(job, Reason.CHECKPOINTS_AWAY, str(error))
        except Exception as error:
            log.exception("job %s failed", job)
            if is_full(error) and job in self._work.jobs:
                self._work.disk_full(job, Path(getattr(error, "filename", None) or self._home), str(error))
            else:
                self._stop(job, Reason.INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    def _stop(self, job: str, reason: Reason, message: str) -> None:
        if job in self._work.jobs:
            self._work.switch(job, reason, message)

    def _redo(self, job: str, lost: LostFolder) -> None:
        """Do a step again whose folder is gone: once, and only if it is the job's own."""
        own = lost.step in {step.id for step in self._work.order(job).job.steps}
        self._work.ledger.forget(lost)
        if own and lost.step not in self._redone:
            self._redone.add(lost.step)
            self._stop(job, Reason.WAITS_FOR_HOST, f"done again: {lost}")
        else:
            self._stop(job, Reason.INTERNAL_ERROR, f"{lost}; submit again to make it anew")
