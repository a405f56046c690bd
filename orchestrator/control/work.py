"""What is under way: unfinished jobs, their orders, and the steps asked of the cluster and not answered yet.

All of it can be lost: the store has every status and every finished step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from orchestrator.contracts import Cluster
from orchestrator.control.books import Books
from orchestrator.control.curve_export import Backoff
from orchestrator.control.fleet import Fleet, Host
from orchestrator.control.ledger import Ledger
from orchestrator.control.submission import Order, read_order
from orchestrator.disk import room
from orchestrator.job import Reason, Status, stays_paused
from orchestrator.plan.steps import Step
from orchestrator.store.rows import JobRow, Report
from orchestrator.store.store import StaleAttempt, Store
from workers.types import Detach, Progress, Superseded

REFRESH_SECONDS = 2.0

log = logging.getLogger(__name__)


Asked = Literal["host", "task", "registry"]


@dataclass(frozen=True)
class Flight:
    """A step that someone was asked for. Another job that has the same step waits for it."""

    step: Step
    job: str
    attempt: int
    of: Asked
    host: str | None = None


class Work:
    """Shared by the parts of the controller; the one place where they change a status."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        home: Path,
        clock: Callable[[], float],
        checkpoints: str = "",
    ) -> None:
        """`checkpoints` as in `Ledger`."""
        self.store = store
        self.cluster = cluster
        self.clock = clock
        self.ledger = Ledger(store, home, checkpoints)
        self.fleet = Fleet(cluster)
        self.books = Books.open(store.scheduling)
        self.flights: dict[str, Flight] = {}
        self.epoch: int | None = None
        """This controller's, once it has begun to work."""
        self.progress: dict[str, Progress] = {}
        """Of the steps under way that have told how far they are."""
        self.jobs: dict[str, JobRow] = {}
        self.parents: dict[str, Status] = {}
        self.ended: list[JobRow] = []
        """Jobs that have finished since the controller last looked."""
        self.host_failures: dict[str, int] = {}
        """Base -> hosts of it lost in a row without a step or a score in between."""
        self._orders: dict[str, Order] = {}
        self._runs: dict[str, str] = {}
        """Of every job at hand, until it is forgotten."""
        self._last_event = -1
        self._refreshed = 0.0
        self._pauses: dict[str, Backoff] = {}

    def news(self) -> bool:
        """Whether anything was submitted, asked for or changed since the store was looked at. Cheap."""
        return self.store.last_event() != self._last_event or bool(self.store.open_requests())

    def refresh(self, run: str | None) -> bool:
        """Look at the store again, as others submit jobs while the controller runs; whether it has changed.

        Its newest event tells whether anything was; the whole is looked at now and then all the same, as two
        transactions of PostgreSQL may commit in another order than they took their numbers. Raises
        Superseded.
        """
        last = self.store.last_event()
        if last == self._last_event and self.clock() - self._refreshed < REFRESH_SECONDS:
            return False
        self._still_the_one()
        news, before = last != self._last_event, self.jobs
        self.jobs = {job.id: job for job in self.store.unfinished_jobs(run, known=self.jobs)}
        self.parents = self.store.statuses({p for job in self.jobs.values() for p in job.depends_on})
        self._last_event, self._refreshed = last, self.clock()
        self._heed_others(before)
        for job in [job for job in self.jobs if job not in self._runs]:
            self._runs[job] = self.jobs[job].run
            if (order := self.readable(job)) is not None:
                self.ledger.learn(order)
            else:
                words = "its stored plan cannot be read by this version of chorus; submit again"
                self.switch(job, Reason.INTERNAL_ERROR, words)
        return news or self.jobs != before

    def _heed_others(self, before: Mapping[str, JobRow]) -> None:
        """Who has the store, but another home, may end or pause jobs past this controller: they leave."""
        ended = [job for job in before if job not in self.jobs and job in self._orders]
        self.ended += [self.store.job(job) for job in ended]
        for host in self.fleet.hosts:
            over = [job for job, attempt in host.residents.items() if self.over(job, attempt)]
            for job in [*over, *(job for job in host.visitors if self.waits(job))]:
                self.leave(job)

    def forget(self) -> bool:
        """Drop what is held of jobs that are nowhere any more; whether there were any.

        Not yet of one that is seated, that something was asked for, or whose end the registry is to be told.
        """
        seated = {job for host in self.fleet.hosts for job in host.seated}
        asked = {flight.job for flight in self.flights.values()}
        kept = self.jobs.keys() | seated | asked | {job.id for job in self.ended}
        gone = (self._orders.keys() | self._runs.keys() | self._pauses.keys()) - kept
        for job in gone:
            for held in (self._orders, self._runs, self._pauses):
                held.pop(job, None)
        if gone:
            self.ledger.keep_only(self.orders)
        return bool(gone)

    def _still_the_one(self) -> None:
        newest = self.store.epochs.newest()
        if self.epoch is not None and newest != self.epoch:
            raise Superseded(newest, self.epoch)

    @property
    def orders(self) -> Collection[Order]:
        """Of the jobs at hand."""
        return self._orders.values()

    def order(self, job: str) -> Order:
        if job not in self._orders:
            self._orders[job] = read_order((self.jobs.get(job) or self.store.job(job)).plan)
        return self._orders[job]

    def readable(self, job: str) -> Order | None:
        """A job's order; None if its stored plan cannot be read."""
        try:
            return self.order(job)
        except ValueError:
            log.exception("the stored plan of %s cannot be read", job)
            return None

    def run_of(self, job: str) -> str | None:
        return self._runs.get(job)

    def present(self, job: str, attempt: int) -> JobRow | None:
        """The job if that attempt of it is still under way: a report of an old one is dropped."""
        row = self.jobs.get(job)
        return row if row is not None and row.attempt == attempt else None

    def over(self, job: str, attempt: int) -> bool:
        """Whether that attempt has ended, on its host or only in the store."""
        return self.present(job, attempt) is None or self.waits(job)

    def waits(self, job: str) -> bool:
        """Whether a job is not under way: it waits, or has finished."""
        return job not in self.jobs or self.jobs[job].status is Status.WAITING

    def note_progress(self, reports: Sequence[Report]) -> None:
        """Keep the rows at hand as the store has them now."""
        for report in reports:
            row = self.present(report.job, report.attempt)
            if row is not None and report.progress is not None:
                told = {key: value for key, value in vars(report.progress).items() if value is not None}
                self.jobs[report.job] = replace(row, **told)

    # ---- status ----------------------------------------------------------------------------------------

    def switch(
        self,
        job: str,
        reason: Reason,
        message: str = "",
        *,
        host: str | None = None,
        who: str = "controller",
        attempt: int | None = None,
    ) -> JobRow:
        """Change a job's status; one that no longer runs gives back where it sat.

        With `attempt`, the report of a host: one of an attempt that is over changes nothing.
        """
        known = self.jobs.get(job)
        if known is not None and stays_paused(known.reason, reason):
            return known
        try:
            row = self.store.switch_status(job, reason, message, who=who, host=host, attempt=attempt)
        except StaleAttempt as error:
            log.warning("a late report is dropped: %s", error)
            return self.store.job(job)
        self.parents[job] = row.status
        if row.status.finished:
            self.jobs.pop(job, None)
            self.ended += [row] if job in self._orders else []
        else:
            self.jobs[job] = row
        if row.status.finished or row.status is Status.WAITING:
            self.leave(job)
        return row

    def set_priority(self, job: str, priority: int, who: str) -> None:
        self.jobs[job] = self.store.set_priority(job, priority, who)

    def disk_full(self, job: str, folder: Path, message: str, attempt: int | None = None) -> None:
        """Queue a job again that found no room in `folder`."""
        self.pause(job, Reason.DISK_FULL, f"{message}; {room(folder)}", attempt)

    def pause(self, job: str, reason: Reason, message: str, attempt: int | None = None) -> None:
        """Queue a job again for after a pause, each twice as long: there may be room, or a way, by then."""
        self._pauses.setdefault(job, Backoff(self.clock)).failed()
        self.switch(job, reason, message, attempt=attempt)

    def pauses(self, job: str) -> bool:
        """Whether a job that could not keep what it has is not to be tried again yet."""
        return job in self._pauses and self._pauses[job].away

    def found_room(self, job: str) -> None:
        self._pauses.pop(job, None)

    def leave(self, job: str) -> None:
        """Take a job off its host. A slot in which it trains is free when the host says so."""
        host = self.fleet.host_of(job)
        if host is not None and job in host.residents and job not in host.leaving:
            attempt = host.residents[job]
            if self.training(job, attempt) is not None:
                self.detach(host, job, attempt)
            else:
                self.fleet.vacate_slot(job, attempt)
        self.fleet.vacate(job)

    def detach(self, host: Host, job: str, attempt: int) -> None:
        """Tell an attempt to leave its slot."""
        host.leaving.add(job)
        self.cluster.send(host.name, Detach(job, attempt))

    def still_seated(self, job: str) -> bool:
        """Whether an attempt of the job has not left its slot yet."""
        host = self.fleet.host_of(job)
        return host is not None and job in host.residents

    # ---- flights ---------------------------------------------------------------------------------------

    def depart(self, step: Step, job: JobRow, of: Asked, host: str | None = None) -> None:
        self.flights[step.id] = Flight(step, job.id, job.attempt, of, host)

    def drop_flights(self, host: Host) -> None:
        """The host is gone, and with it what it was asked for."""
        self.flights = {key: flight for key, flight in self.flights.items() if flight.host != host.name}

    def trainings(self) -> dict[tuple[str, int], Flight]:
        """(job, attempt) -> the training that it was sent to do and has not come back from."""
        return {(f.job, f.attempt): f for f in self.flights.values() if f.step.kind == "train"}

    def training(self, job: str, attempt: int) -> Flight | None:
        return self.trainings().get((job, attempt))

    def drop_training(self, job: str, attempt: int) -> Flight | None:
        """The attempt has left its slot, finished or not; what it was sent to do."""
        self.fleet.vacate_slot(job, attempt)
        flight = self.training(job, attempt)
        return self.flights.pop(flight.step.id) if flight else None
