"""The database under the store: a SQLite file for one machine, PostgreSQL for a cluster. No table, no query.

What only one of them needs is here, and what to do when a server goes away: every method of the store is one
short transaction that may be done twice, so it is done again until the server answers.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from orchestrator.store.tables import WRITES
from workers.types import BadInput

LOCK_SECONDS = 30
PATIENCE = 10.0
"""Seconds a command waits for a server that does not answer; a controller is given more."""
LONGEST_WAIT = 2.0
CONNECT_SECONDS = 5
SQLITE_PRAGMAS = (
    f"busy_timeout = {LOCK_SECONDS * 1000}",
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
)
OUT_OF_RESOURCES = "53"
"""Class of PostgreSQL's codes for a full disk and the like: waiting a moment does not help."""

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class StoreUnreachable(Exception):
    """The store's server did not answer for as long as was waited."""


def parse(url: str) -> URL:
    """A store's URL, with the driver we ship. Raises BadInput."""
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise BadInput(_no_url(url)) from error
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        raise BadInput(_no_url(url))
    return parsed


def _no_url(url: str) -> str:
    # Never the URL itself: it may hold a password.
    scheme = url.partition(":")[0] if ":" in url else "no scheme"
    return (
        f"the store ({scheme}) is neither sqlite:///FILE nor postgresql://USER@HOST:PORT/DATABASE; "
        "correct --store or CHORUS_STORE"
    )


def open_engine(url: str) -> Engine:
    """An engine, nothing asked of it yet. SQLite's folder is made if absent. Raises BadInput."""
    parsed = parse(url)
    if parsed.get_backend_name() == "postgresql":
        # A connection that the server dropped while it lay in the pool is not handed out.
        return create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_SECONDS})
    engine = create_engine(parsed)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


# ---- a server that goes away ----------------------------------------------------------------------------


class Patient(Protocol):
    """Whoever has methods marked `patiently`."""

    patience: float
    """Seconds."""


class Part:
    """Of the store: what reads and writes some of its tables, each method one transaction."""

    def __init__(self, engine: Engine, patience: float, clock: Callable[[], float]) -> None:
        self.patience = patience
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})
        self._clock = clock


S = TypeVar("S", bound=Patient)


def patiently(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Do a method again while the server does not answer, for `patience` seconds; then StoreUnreachable.

    For methods that are one transaction and may be done twice: a commit's answer can be lost as well.
    """

    @functools.wraps(method)
    def call(self: S, *args: P.args, **named: P.kwargs) -> T:
        deadline, wait = time.monotonic() + self.patience, 0.05
        while True:
            try:
                return method(self, *args, **named)
            except DBAPIError as error:
                if not is_away(error):
                    raise
                if time.monotonic() + wait > deadline:
                    raise StoreUnreachable(f"the store does not answer: {_first_line(error)}") from error
                log.warning("the store does not answer (%s); trying again", _first_line(error))
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    return call


def is_away(error: DBAPIError) -> bool:
    """Whether PostgreSQL cannot be reached, is just starting, or broke a transaction off (a deadlock)."""
    import psycopg  # only where PostgreSQL may be meant: a command on SQLite does without

    if not isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    return not (error.orig.sqlstate or "").startswith(OUT_OF_RESOURCES)


def _first_line(error: DBAPIError) -> str:
    return next(iter(str(error.orig).strip().splitlines()), "no message")


# ---- SQLite ---------------------------------------------------------------------------------------------


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own: see below
    for pragma in SQLITE_PRAGMAS:
        _unlocked(lambda pragma=pragma: connection.execute(f"PRAGMA {pragma}"))


def _unlocked(act: Callable[[], object]) -> None:
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
