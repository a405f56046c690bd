"""The SQL store: runs, jobs, finished steps, events, requests. The only writer of a job's status.

Every method is one short transaction with no work inside. `switch_status` is the one door through which a
status changes; it writes the event in the same transaction. Curves are in `store_curves`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from orchestrator.job import (
    FINISHED,
    Reason,
    Status,
    ends_attempt,
    next_status,
    run_status,
    within_budget,
)
from orchestrator.store import tables
from orchestrator.store.curves import CurveStore
from orchestrator.store.rows import (
    EventRow,
    JobRow,
    MetricRow,
    NewJob,
    NewRun,
    Progress,
    Request,
    RunRow,
    StepRow,
)
from orchestrator.store.scheduling import SchedulingStore


class NoSuchJob(LookupError):
    """No job or run of that id."""


class StaleAttempt(Exception):
    """A report of an attempt that is over: to be dropped."""


class Store:
    """`Store.open(path)` for a SQLite file, `Store(url)` for any SQLAlchemy URL."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        engine = tables.open_engine(url)
        self._engine = engine
        self._writer = engine.execution_options(**{tables.WRITES: True})
        self._clock = clock
        self.curves = CurveStore(engine)
        self.scheduling = SchedulingStore(engine)

    @classmethod
    def open(cls, path: Path) -> Store:
        """The store in a SQLite file, made if absent."""
        return cls(f"sqlite:///{path}")

    def close(self) -> None:
        self._engine.dispose()

    # ---- runs and jobs ----------------------------------------------------------------------------------

    def submit(self, new: NewRun, who: str = "user") -> str:
        """The id of an unfinished run of the same key, else of a new run whose jobs are WAITING."""
        while True:
            try:
                return self._submit(new, who)
            except IntegrityError:
                if new.key not in {run.key for run in self.runs()}:
                    raise
                # Another process took the same number: look again.

    def _submit(self, new: NewRun, who: str) -> str:
        now = self._clock()
        with self._writer.begin() as db:
            # One query tells what is unfinished and what number comes next: with two, another process could
            # commit in between, and PostgreSQL would let both make a run.
            earlier = _statuses_of_key(db, new.key)
            for run, statuses in earlier.items():
                if not run_status(statuses).finished:
                    return run
            number = len(earlier) + 1
            run = f"{new.name}-{new.key[:6]}-{number}"
            row = {"id": run, "name": new.name, "key": new.key, "number": number}
            db.execute(insert(tables.runs), {**row, "recipe": dict(new.recipe), "submitted_at": now})
            for position, job in enumerate(new.jobs):
                db.execute(insert(tables.jobs), _job_values(run, position, job, now))
                _write_event(db, f"{run}.{job.name}", now, who, 0, None, Reason.SUBMITTED, "")
        return run

    def runs(self) -> tuple[RunRow, ...]:
        """Every run, the newest first."""
        order = (tables.runs.c.submitted_at.desc(), tables.runs.c.number.desc())
        with self._engine.connect() as db:
            rows = db.execute(select(tables.runs).order_by(*order)).mappings().all()
            pairs = db.execute(select(tables.jobs.c.run, tables.jobs.c.status)).all()
        statuses: dict[str, list[Status]] = {}
        for run, status in pairs:
            statuses.setdefault(run, []).append(Status(status))
        return tuple(_run_row(row, statuses.get(row["id"], [])) for row in rows)

    def run(self, run: str) -> RunRow:
        """Raises NoSuchJob."""
        for row in self.runs():
            if row.id == run:
                return row
        raise NoSuchJob(f"there is no run {run!r}")

    def jobs(self, run: str | None = None) -> tuple[JobRow, ...]:
        """The jobs of one run, or all, in the order of submission."""
        query = select(tables.jobs).order_by(tables.jobs.c.submitted_at, tables.jobs.c.position)
        if run is not None:
            query = query.where(tables.jobs.c.run == run)
        with self._engine.connect() as db:
            return tuple(_job_row(row) for row in db.execute(query).mappings())

    def unfinished_jobs(self, run: str | None = None) -> tuple[JobRow, ...]:
        """The jobs of one run, or all, that have not finished, in the order of submission."""
        finished = [status.value for status in FINISHED]
        query = select(tables.jobs).where(tables.jobs.c.status.not_in(finished))
        if run is not None:
            query = query.where(tables.jobs.c.run == run)
        order = (tables.jobs.c.submitted_at, tables.jobs.c.position)
        with self._engine.connect() as db:
            return tuple(_job_row(row) for row in db.execute(query.order_by(*order)).mappings())

    def statuses(self, jobs: set[str]) -> dict[str, Status]:
        query = select(tables.jobs.c.id, tables.jobs.c.status).where(tables.jobs.c.id.in_(jobs))
        with self._engine.connect() as db:
            return {job: Status(status) for job, status in db.execute(query).all()}

    def job(self, job: str) -> JobRow:
        """Raises NoSuchJob."""
        with self._engine.connect() as db:
            return _job_row(_find(db, job))

    # ---- status ---------------------------------------------------------------------------------------

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
            row = _job_row(_find(db, job))
            if attempt is not None and attempt != row.attempt:
                raise StaleAttempt(f"{job}: attempt {attempt} is over, {row.attempt} is the present one")
            if ends_attempt(row.status, reason):
                reason, message = within_budget(reason, message, _times_ended(db, job, reason))
            status = next_status(row.status, reason)
            if (status, reason, message) != (row.status, row.reason, row.message):
                values = {"message": message, **_consequences(row, status, reason, host, now)}
                db.execute(update(tables.jobs).where(tables.jobs.c.id == job).values(values))
                after = _job_row(_find(db, job))
                _write_event(db, job, now, who, after.attempt, row.status, reason, message)
                return after
            return row

    def write_progress(self, job: str, attempt: int, progress: Progress) -> None:
        """Write how far a job is. Does nothing when `attempt` is over."""
        values = {name: value for name, value in asdict(progress).items() if value is not None}
        row = (tables.jobs.c.id == job) & (tables.jobs.c.attempt == attempt)
        with self._writer.begin() as db:
            db.execute(update(tables.jobs).where(row).values(values))

    def events(self, job: str) -> tuple[EventRow, ...]:
        """What happened to a job, the oldest first."""
        query = select(tables.events).where(tables.events.c.job == job).order_by(tables.events.c.id)
        with self._engine.connect() as db:
            return tuple(_event_row(row) for row in db.execute(query).mappings())

    def metrics(self, job: str, after: int = -1) -> tuple[MetricRow, ...]:
        """A job's training curve beyond step `after`."""
        return self.curves.read(self.job(job).series, after)

    # ---- finished steps -------------------------------------------------------------------------------

    def finish_step(self, step: str, kind: str, job: str, result: Mapping[str, Any]) -> None:
        """Record a step as done. A second record of the same step changes nothing: the first one stands."""
        row = {"id": step, "kind": kind, "job": job, "result": dict(result), "finished_at": self._clock()}
        with self._writer.begin() as db:
            query = select(tables.steps.c.id).where(tables.steps.c.id == step)
            if db.execute(query).first() is None:
                db.execute(insert(tables.steps), row)

    def forget_step(self, step: str) -> None:
        """Take a step's record back because what it made is gone: it will be done again."""
        with self._writer.begin() as db:
            db.execute(delete(tables.steps).where(tables.steps.c.id == step))

    def finished_steps(self, steps: set[str] | None = None) -> dict[str, StepRow]:
        """Finished steps by id: those among `steps`, or all."""
        query = select(tables.steps)
        if steps is not None:
            query = query.where(tables.steps.c.id.in_(steps))
        with self._engine.connect() as db:
            return {row["id"]: StepRow(**row) for row in db.execute(query).mappings()}

    # ---- requests -------------------------------------------------------------------------------------

    def request_cancel(self, job: str, who: str = "user") -> None:
        """Ask the controller to cancel a job. Raises NoSuchJob; does nothing when it is finished."""
        if not self.job(job).status.finished:
            row = {"job": job, "kind": "cancel", "who": who, "at": self._clock()}
            with self._writer.begin() as db:
                db.execute(insert(tables.requests), row)

    def open_requests(self) -> tuple[Request, ...]:
        t = tables.requests.c
        query = select(t.id, t.job, t.kind, t.who).where(t.handled_at.is_(None)).order_by(t.id)
        with self._engine.connect() as db:
            return tuple(Request(**row) for row in db.execute(query).mappings())

    def close_request(self, request: int) -> None:
        row = tables.requests.c.id == request
        with self._writer.begin() as db:
            db.execute(update(tables.requests).where(row).values(handled_at=self._clock()))


def _statuses_of_key(db: Connection, key: str) -> dict[str, list[Status]]:
    """The job statuses of every run of `key`, the newest run first."""
    joined = tables.runs.join(tables.jobs, tables.jobs.c.run == tables.runs.c.id)
    query = select(tables.runs.c.id, tables.jobs.c.status).select_from(joined)
    query = query.where(tables.runs.c.key == key).order_by(tables.runs.c.number.desc())
    statuses: dict[str, list[Status]] = {}
    for run, status in db.execute(query).all():
        statuses.setdefault(run, []).append(Status(status))
    return statuses


def _job_values(run: str, position: int, job: NewJob, now: float) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in ("name", "kind", "recipe_hash", "series", "priority")}
    return {
        **values,
        "id": f"{run}.{job.name}",
        "run": run,
        "position": position,
        "recipe": dict(job.recipe),
        "plan": dict(job.plan),
        "depends_on": [f"{run}.{name}" for name in job.depends_on],
        "status": Status.WAITING.value,
        "reason": Reason.SUBMITTED.value,
        "message": "",
        "attempt": 0,
        "submitted_at": now,
        "step": 0,
    }


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


def _job_row(row: RowMapping) -> JobRow:
    values = {name: value for name, value in row.items() if name != "position"}
    values["depends_on"] = tuple(values["depends_on"])
    values["status"] = Status(values["status"])
    values["reason"] = Reason(values["reason"])
    return JobRow(**values)


def _run_row(row: RowMapping, statuses: list[Status]) -> RunRow:
    values = {name: value for name, value in row.items() if name != "number"}
    return RunRow(**values, status=run_status(statuses))


def _event_row(row: RowMapping) -> EventRow:
    before = Status(row["before"]) if row["before"] else None
    values: dict[str, Any] = {
        "before": before,
        "after": Status(row["after"]),
        "reason": Reason(row["reason"]),
    }
    return EventRow(**(dict(row) | values))


def _write_event(
    db: Connection,
    job: str,
    at: float,
    who: str,
    attempt: int,
    before: Status | None,
    reason: Reason,
    message: str,
) -> None:
    after = next_status(before, reason) if before else Status.WAITING
    row = {"job": job, "at": at, "who": who, "attempt": attempt, "message": message}
    words = {"before": before and before.value, "after": after.value, "reason": reason.value}
    db.execute(insert(tables.events), row | words)
