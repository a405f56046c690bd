"""The SQL tables of the store, and the engine they live in. No query: `store` has those.

Portable between SQLite and PostgreSQL; what only SQLite needs is set on its connections here.
Times are seconds since the epoch, UTC.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)

WRITES = "chorus_writes"
"""Execution option of the connections that write: SQLite then takes its lock at the beginning."""

LOCK_SECONDS = 30
SQLITE_PRAGMAS = (
    f"busy_timeout = {LOCK_SECONDS * 1000}",
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
)

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
    """One row a step of a series, with the loss there."""
    return Table(
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
    Column("handled_at", Float),
)

scheduling = Table(
    "scheduling",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", JSON, nullable=False),
)


def open_engine(url: str) -> Engine:
    """An engine for `url` with every table in place. SQLite's folder is made if absent."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        if engine.url.database and engine.url.database != ":memory:":
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        metadata.create_all(connection)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own: see below
    for pragma in SQLITE_PRAGMAS:
        _patiently(lambda pragma=pragma: connection.execute(f"PRAGMA {pragma}"))


def _patiently(act: Callable[[], object]) -> None:
    """SQLite refuses a change to WAL beside another's at once, whatever `busy_timeout` says."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            act()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once when another wrote in between; taking
    # the write lock at the beginning makes it wait instead.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
