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
from collections.abc import Callable
from pathlib import Path

from orchestrator.contracts import Cluster, Registry
from orchestrator.control import picture
from orchestrator.control.acting import Acting
from orchestrator.control.adoption import adopt
from orchestrator.control.curve_export import Backoff, CurveExport
from orchestrator.control.errands import Errands, Start, on_a_thread
from orchestrator.control.guard import Guard
from orchestrator.control.host_events import hear
from orchestrator.control.pace import TICK_SECONDS, Pace
from orchestrator.control.registration import Registration
from orchestrator.control.requests import grant
from orchestrator.control.show import Board
from orchestrator.control.steps import Steps
from orchestrator.control.work import Work
from orchestrator.job import Reason, Status
from orchestrator.policy import Policy
from orchestrator.queue import Waiting, parents_verdict
from orchestrator.recipe.teams import PolicyFile
from orchestrator.scheduler import schedule
from orchestrator.store.store import Store
from orchestrator.who import user_at_machine
from workers.types import Superseded

DECIDE_SECONDS = 1.0
"""What depends on the clock alone (waits, shares, idle hosts) is looked at so often."""
LET_GO_SECONDS = 30.0
CLOSE_SECONDS = 15.0
"""Given to the registry at the end: for what it was asked, and again for the last points of curves."""

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
        home = home.resolve()
        self._run = run
        self._backoff = Backoff(clock)
        self._work = work = Work(store, cluster, home, clock, checkpoints)
        self._errands = Errands(start)
        self._curves = CurveExport(store, registry, self._errands, self._backoff, clock)
        registration = Registration(registry, work.ledger, self._curves, home)
        self._guard = guard = Guard(work, self._backoff, home)
        self._steps = Steps(work, registration, self._errands, self._backoff, guard)
        self._acting = Acting(work, self._steps, guard)
        self._policy = PolicyFile(home / "teams.yaml")
        self._board = Board(work, home)
        self._pace = Pace(clock)
        self._decided_at = float("-inf")

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
        self._acting.act(decision, {job.job: job for job in waiting})
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
            self._acting.keep_only(work.jobs)
