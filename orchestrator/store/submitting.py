"""Submitting a pipeline: whole or not at all, once by its content, once for ever by a key.

Inside a transaction of the store's. Also how an event is written, which a submission needs first.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select

from orchestrator.job import Reason, Status, next_status, run_status
from orchestrator.store import tables
from orchestrator.store.rows import NewJob, NewRun
from workers.types import BadInput


def submit(db: Connection, new: NewRun, who: str, now: float) -> str:
    """The id of the run. Raises BadInput for a token that cannot be one, or was used for something else,
    IntegrityError in a race."""
    if new.token is not None and not (0 < len(new.token) <= tables.KEY_LENGTH and new.token.isprintable()):
        raise BadInput(
            f"--key: this has {len(new.token)} characters; take from 1 to {tables.KEY_LENGTH}, all printable"
        )
    if new.token is not None and (known := _by_token(db, new)) is not None:
        return known
    # One query tells what is unfinished and what number comes next: with two, another process could
    # commit in between, and PostgreSQL would let both make a run.
    earlier = _statuses_of_key(db, new.key)
    if new.token is None:
        for run, statuses in earlier.items():
            if not run_status(statuses).finished:
                return run
    number = len(earlier) + 1
    run = f"{new.name}-{new.key[:6]}-{number}"
    row = {"id": run, "name": new.name, "key": new.key, "number": number, "token": new.token}
    db.execute(insert(tables.runs), {**row, "recipe": dict(new.recipe), "submitted_at": now})
    rows = [_job_values(run, position, job, now) for position, job in enumerate(new.jobs)]
    db.execute(insert(tables.jobs), rows)
    for values in rows:
        write_event(db, values["id"], now, who, 0, None, Reason.SUBMITTED, "")
    return run


def write_event(
    db: Connection,
    job: str,
    at: float,
    who: str,
    attempt: int,
    before: Status | None,
    reason: Reason,
    message: str,
    after: Status | None = None,
) -> None:
    """`after` is where `reason` leads to, unless it is given."""
    after = after or (next_status(before, reason) if before else Status.WAITING)
    row = {"job": job, "at": at, "who": who, "attempt": attempt, "message": message}
    words = {"before": before and before.value, "after": after.value, "reason": reason.value}
    db.execute(insert(tables.events), row | words)


def _by_token(db: Connection, new: NewRun) -> str | None:
    query = select(tables.runs.c.id, tables.runs.c.key).where(tables.runs.c.token == new.token)
    row = db.execute(query).first()
    if row is None:
        return None
    if row.key != new.key:
        raise BadInput(f"--key {new.token}: it was used to submit {row.id}, which is not this; take another")
    return row.id


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
