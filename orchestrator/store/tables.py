"""The SQL tables of the store, portable between SQLite and PostgreSQL. No query: `store` has those.

A change here needs a migration (`migrations/versions`): a test holds the two together. Times are seconds
since the epoch, UTC.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

WRITES = "chorus_writes"
"""Execution option of the connections that write: SQLite then takes its lock at the beginning."""

KEY_LENGTH = 200
"""Characters of a submitter's own key: PostgreSQL refuses more."""

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("name", String(120), nullable=False),
    Column("key", String(64), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("token", String(KEY_LENGTH), unique=True, index=True),
    UniqueConstraint("key", "number"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(320), primary_key=True),
    Column("run", String(200), ForeignKey("runs.id"), nullable=False, index=True),
    Column("position", Integer, nullable=False),
    Column("name", String(120), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("recipe_hash", String(64), nullable=False),
    Column("series", String(80), nullable=False),
    Column("depends_on", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("status", String(20), nullable=False, index=True),
    Column("reason", String(40), nullable=False),
    Column("message", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("host", String(120)),
    Column("submitted_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer),
    Column("loss", Float),
    Column("tokens_per_second", Float),
)

steps = Table(
    "steps",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("job", String(320), nullable=False),
    Column("result", JSON, nullable=False),
    Column("finished_at", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job", String(320), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("who", String(80), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("before", String(20)),
    Column("after", String(20), nullable=False),
    Column("reason", String(40), nullable=False),
    Column("message", Text, nullable=False),
)


def _curve(name: str, *more: Column[Any]) -> Table:
    """One row a step of a series, with the loss there. What the registry lacks has an index."""
    table = Table(
        name,
        metadata,
        Column("series", String(80), primary_key=True),
        Column("step", Integer, primary_key=True, autoincrement=False),
        Column("attempt", Integer, nullable=False),
        Column("at", Float, nullable=False),
        Column("loss", Float),
        *more,
        Column("exported", Boolean, nullable=False),
    )
    lacking = table.c.exported.is_(False)
    Index(f"ix_{name}_pending", table.c.series, sqlite_where=lacking, postgresql_where=lacking)
    return table


metrics = _curve(
    "metrics",
    Column("grad_norm", Float),
    Column("learning_rate", Float),
    Column("tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("skipped", Boolean, nullable=False),
)
validations = _curve("validations")

requests = Table(
    "requests",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job", String(320), ForeignKey("jobs.id"), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("who", String(80), nullable=False),
    Column("at", Float, nullable=False),
    Column("handled_at", Float, index=True),
    Column("value", JSON),
)

scheduling = Table(
    "scheduling",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", JSON, nullable=False),
)
"""One row: what the policy remembers from tick to tick."""

controllers = Table(
    "controllers",
    metadata,
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("who", String(200), nullable=False),
    Column("at", Float, nullable=False),
)
"""Every controller that began to work here; the one of the highest epoch is the one that may."""

boards = Table(
    "boards",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", JSON, nullable=False),
    Column("at", Float, nullable=False),
)
"""What the controller shows of itself, for commands that only look. All of it can be lost."""
