"""The SQL store: runs, jobs, events, requests. The only writer of a job's status.

Every method is one short transaction with no work inside, and may be done twice: while a server does not
answer it is done again. `switch_status` is the one door through which a status changes; it writes the event
in the same transaction. What hangs on no status has a part of its own: `curves`, `steps`, `boards`,
`epochs`, `scheduling`; how a submission and a host's reports are written is in `submitting` and `reports`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from orchestrator.job import (
    FINISHED,
    Reason,
    Status,
    ends_attempt,
    next_status,
    within_budget,
)
from orchestrator.store import tables
from orchestrator.store.boards import BoardStore
from orchestrator.store.curves import CurveStore
from orchestrator.store.engine import PATIENCE, Part, open_engine, patiently
from orchestrator.store.epochs import EpochStore
from orchestrator.store.reading import (
    HEAVY,
    NEWEST_RUN,
    event_row,
    heavy_columns,
    heavy_of,
    job_row,
    portions,
    read_runs,
)
from orchestrator.store.reports import write_reports
from orchestrator.store.rows import (
    EventRow,
    JobRow,
    MetricRow,
    NewRun,
    Progress,
    Report,
    Request,
    RequestKind,
    RunRow,
)
from orchestrator.store.scheduling import SchedulingStore
from orchestrator.store.schema import migrate
from orchestrator.store.steps import StepStore
from orchestrator.store.submitting import submit, write_event


class NoSuchJob(LookupError):
    """No job or run of that id."""


class StaleAttempt(Exception):
    """A report of an attempt that is over: to be dropped."""


class Store(Part):
    """`Store.open(path)` for a SQLite file, `Store(url)` for that or a PostgreSQL database."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time, patience: float = PATIENCE) -> None:
        """Its tables are made, or migrated, if need be. Raises BadInput, StoreUnreachable."""
        engine = open_engine(url)
        parts = engine, patience, clock
        super().__init__(*parts)
        self.curves = CurveStore(*parts)
        self.scheduling = SchedulingStore(*parts)
        self.epochs = EpochStore(*parts)
        self.steps = StepStore(*parts)
        self.boards = BoardStore(*parts)
        self._migrate()

    @patiently
    def _migrate(self) -> None:
        migrate(self._engine)

    @classmethod
    def open(cls, path: Path) -> Store:
        """The store in a SQLite file, made if absent."""
        return cls(f"sqlite:///{path}")

    def close(self) -> None:
        self._engine.dispose()

    def wait_for_it(self, seconds: float) -> None:
        """Wait so long for a server that is away, from now on."""
        for patient in (self, self.curves, self.scheduling, self.epochs, self.steps, self.boards):
            patient.patience = seconds

    # ---- runs and jobs ----------------------------------------------------------------------------------

    def submit(self, new: NewRun, who: str = "user") -> str:
        """The id of an unfinished run of the same key, else of a new run whose jobs are WAITING.

        Under a token it is the run first submitted under it, whatever became of it. On disk at the return.
        Raises BadInput for a token that was used for something else.
        """
        while True:
            try:
                return self._submit(new, who)
            except IntegrityError:
                if not self.runs_of_key(new.key):
                    raise
                # Another process took the same number or token: look again.

    @patiently
    def _submit(self, new: NewRun, who: str) -> str:
        with self._writer.begin() as db:
            return submit(db, new, who, self._clock())

    @patiently
    def runs(self) -> tuple[RunRow, ...]:
        """Every run, the newest first."""
        with self._engine.connect() as db:
            return read_runs(db)

    @patiently
    def runs_of_key(self, key: str) -> tuple[RunRow, ...]:
        """The runs of one content, the newest first."""
        with self._engine.connect() as db:
            return read_runs(db, tables.runs.c.key == key)

    @patiently
    def newest_run(self) -> RunRow | None:
        with self._engine.connect() as db:
            run = db.execute(select(tables.runs.c.id).order_by(*NEWEST_RUN).limit(1)).scalar()
            return read_runs(db, tables.runs.c.id == run)[0] if run is not None else None

    @patiently
    def newest_run_with(self, name: str) -> str | None:
        """The id of the newest run of that name, or with a job of that name."""
        of_job = select(tables.jobs.c.run).where(tables.jobs.c.name == name)
        query = select(tables.runs.c.id).where((tables.runs.c.name == name) | tables.runs.c.id.in_(of_job))
        with self._engine.connect() as db:
            return db.execute(query.order_by(*NEWEST_RUN).limit(1)).scalar()

    @patiently
    def run(self, run: str) -> RunRow:
        """Raises NoSuchJob."""
        with self._engine.connect() as db:
            found = read_runs(db, tables.runs.c.id == run)
        if not found:
            raise NoSuchJob(f"there is no run {run!r}")
        return found[0]

    @patiently
    def jobs(self, run: str | None = None) -> tuple[JobRow, ...]:
        """The jobs of one run, or all, in the order of submission."""
        query = select(tables.jobs).order_by(
            tables.jobs.c.submitted_at, tables.jobs.c.run, tables.jobs.c.position
        )
        if run is not None:
            query = query.where(tables.jobs.c.run == run)
        with self._engine.connect() as db:
            return tuple(job_row(row) for row in db.execute(query).mappings())

    @patiently
    def unfinished_jobs(
        self, run: str | None = None, known: Mapping[str, JobRow] | None = None
    ) -> tuple[JobRow, ...]:
        """The jobs of one run, or all, that have not finished, in the order of submission.

        Of those in `known` only what can change is read: recipes and plans are most of a job's bytes.
        """
        known = known or {}
        condition = tables.jobs.c.status.not_in([status.value for status in FINISHED])
        if run is not None:
            condition &= tables.jobs.c.run == run
        light = [column for column in tables.jobs.c if column.name not in HEAVY]
        order = (tables.jobs.c.submitted_at, tables.jobs.c.run, tables.jobs.c.position)
        with self._engine.connect() as db:
            rows = db.execute(select(*light).where(condition).order_by(*order)).mappings().all()
            fresh = heavy_columns(db, [row["id"] for row in rows if row["id"] not in known])
        return tuple(job_row(row, fresh.get(row["id"]) or heavy_of(known[row["id"]])) for row in rows)

    @patiently
    def ended_with_series(self, series: Set[str]) -> tuple[JobRow, ...]:
        """Failed and cancelled jobs of these series, but of those that an unfinished job has as well."""
        t = tables.jobs.c
        under_way = select(t.series).where(t.status.not_in([status.value for status in FINISHED]))
        ended = t.status.in_([Status.FAILED.value, Status.CANCELLED.value]) & t.series.not_in(under_way)
        query = select(tables.jobs).where(ended).order_by(t.finished_at)
        with self._engine.connect() as db:
            return tuple(
                job_row(row)
                for some in portions(series)
                for row in db.execute(query.where(t.series.in_(some))).mappings()
            )

    @patiently
    def latest_paces(self, count: int) -> tuple[tuple[str, str | None, float], ...]:
        """(host key of its base, host if it sits on one, tokens a second) of the jobs last seen training."""
        t = tables.jobs.c
        query = select(t.plan, t.host, t.tokens_per_second).where(t.tokens_per_second.is_not(None))
        query = query.order_by(t.submitted_at.desc(), t.id).limit(count)
        with self._engine.connect() as db:
            return tuple((row[0]["job"]["host_key"], row[1], row[2]) for row in db.execute(query))

    @patiently
    def last_event(self) -> int:
        """Number of the newest event: as long as it stays, no status changed and nothing was submitted."""
        with self._engine.connect() as db:
            return db.execute(select(func.max(tables.events.c.id))).scalar() or 0

    @patiently
    def statuses(self, jobs: set[str]) -> dict[str, Status]:
        query = select(tables.jobs.c.id, tables.jobs.c.status)
        with self._engine.connect() as db:
            pairs = [
                pair
                for some in portions(jobs)
                for pair in db.execute(query.where(tables.jobs.c.id.in_(some)))
            ]
        return {job: Status(status) for job, status in pairs}

    @patiently
    def job(self, job: str) -> JobRow:
        """Raises NoSuchJob."""
        with self._engine.connect() as db:
            return job_row(_find(db, job))

    # ---- status ---------------------------------------------------------------------------------------

    @patiently
    def switch_status(
        self,
        job: str,
        reason: Reason,
        message: str = "",
        *,
        who: str = "controller",
        attempt: int | None = None,
        host: str | None = None,
    ) -> JobRow:
        """Give a job the status its reason leads to, and write the event, in one transaction.

        PLACED begins a new attempt on `host`. A switch that changes nothing writes nothing. Raises NoSuchJob,
        IllegalSwitch, and StaleAttempt when `attempt` is given and is not the job's present one. A reason
        that has ended as many attempts as `REASONS` allows becomes OUT_OF_RETRIES.
        """
        now = self._clock()
        with self._writer.begin() as db:
            row = job_row(_find(db, job))
            if attempt is not None and attempt != row.attempt:
                raise StaleAttempt(f"{job}: attempt {attempt} is over, {row.attempt} is the present one")
            if ends_attempt(row.status, reason):
                reason, message = within_budget(reason, message, _times_ended(db, job, reason))
            status = next_status(row.status, reason)
            if (status, reason, message) != (row.status, row.reason, row.message):
                values = {"message": message, **_consequences(row, status, reason, host, now)}
                db.execute(update(tables.jobs).where(tables.jobs.c.id == job).values(values))
                after = job_row(_find(db, job))
                write_event(db, job, now, who, after.attempt, row.status, reason, message)
                return after
            return row

    @patiently
    def set_priority(self, job: str, priority: int, who: str) -> JobRow:
        """Give a job another priority, and write the event. Raises NoSuchJob."""
        with self._writer.begin() as db:
            row = job_row(_find(db, job))
            if row.priority != priority:
                words = f"priority {row.priority} -> {priority} by {who}"
                db.execute(update(tables.jobs).where(tables.jobs.c.id == job).values(priority=priority))
                event = (row.status, row.reason, words, row.status)
                write_event(db, job, self._clock(), who, row.attempt, *event)
            return replace(row, priority=priority)

    def write_progress(self, job: str, attempt: int, progress: Progress) -> None:
        """Write how far a job is. Does nothing when `attempt` is over."""
        self.write_reports([Report(job, attempt, "", (), progress)])

    @patiently
    def write_reports(self, reports: Sequence[Report]) -> None:
        """Curves and progress of several attempts in one transaction; those of stale attempts are dropped."""
        with self._writer.begin() as db:
            write_reports(db, reports, self._clock())

    @patiently
    def events(self, job: str) -> tuple[EventRow, ...]:
        """What happened to a job, the oldest first."""
        query = select(tables.events).where(tables.events.c.job == job).order_by(tables.events.c.id)
        with self._engine.connect() as db:
            return tuple(event_row(row) for row in db.execute(query).mappings())

    @patiently
    def metrics(self, job: str, after: int = -1) -> tuple[MetricRow, ...]:
        """A job's training curve beyond step `after`."""
        return self.curves.read(self.job(job).series, after)

    # ---- requests -------------------------------------------------------------------------------------

    @patiently
    def request(self, job: str, kind: RequestKind, who: str = "user", value: Any = None) -> None:
        """Ask the controller for something. Raises NoSuchJob; does nothing when the job is finished."""
        if not self.job(job).status.finished:
            row = {"job": job, "kind": kind, "who": who, "at": self._clock(), "value": value}
            with self._writer.begin() as db:
                db.execute(insert(tables.requests), row)

    @patiently
    def open_requests(self) -> tuple[Request, ...]:
        t = tables.requests.c
        query = select(t.id, t.job, t.kind, t.who, t.value).where(t.handled_at.is_(None)).order_by(t.id)
        with self._engine.connect() as db:
            return tuple(Request(**row) for row in db.execute(query).mappings())

    @patiently
    def close_request(self, request: int) -> None:
        row = tables.requests.c.id == request
        with self._writer.begin() as db:
            db.execute(update(tables.requests).where(row).values(handled_at=self._clock()))


def _consequences(
    row: JobRow, status: Status, reason: Reason, host: str | None, now: float
) -> dict[str, Any]:
    """The columns that change with a status."""
    changes: dict[str, Any] = {"status": status.value, "reason": reason.value}
    if reason is Reason.PLACED:
        changes |= {"attempt": row.attempt + 1, "host": host, "started_at": row.started_at or now}
    if status in FINISHED:
        changes |= {"host": None, "finished_at": now}
    if status is Status.WAITING:
        changes |= {"host": None}
    return changes


def _times_ended(db: Connection, job: str, reason: Reason) -> int:
    """How many attempts of a job `reason` has ended: its events tell."""
    events = tables.events.c
    ended = (events.job == job) & (events.reason == reason.value) & (events.before != Status.WAITING.value)
    return db.execute(select(func.count()).select_from(tables.events).where(ended)).scalar_one()


def _find(db: Connection, job: str) -> RowMapping:
    # PostgreSQL locks the row until the end of the transaction; SQLite has its own lock.
    query = select(tables.jobs).where(tables.jobs.c.id == job)
    row = db.execute(query.with_for_update()).mappings().first()
    if row is None:
        raise NoSuchJob(f"there is no job {job!r}")
    return row
