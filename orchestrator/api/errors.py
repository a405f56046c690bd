"""From an exception to one sentence and an exit code: the only such table. Imports what raises late."""

from __future__ import annotations

import errno

from orchestrator.disk import is_full

OK, INTERNAL, USAGE, REFUSED, UNREACHABLE = 0, 1, 2, 3, 4
NO_RIGHT = "42501"
"""PostgreSQL's code for what a role may not do."""
FAILED, UNFINISHED, NOT_FOUND, CANCELLED, INTERRUPTED = 100, 101, 102, 103, 130


class Refused(Exception):
    """What was asked for is against a gate or a policy."""


class DiskFull(Exception):
    """A disk takes no more; the message says where, how much is free, and what to do."""


class TaskFailed(Exception):
    """A fusion or an export ended without a result, through no fault of the user."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence; None for an error that only a traceback can tell."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return INTERNAL, f"{error.name} is not installed; `chorus doctor` says what is missing"
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return _explain_os(error)
    from orchestrator.api.client import ServerSaid

    if isinstance(error, ServerSaid):
        return error.code, _one_line(error)
    code = next((code for kind, code in kinds() if isinstance(error, kind)), None)
    if code is not None:
        return code, _one_line(error)
    return _explain_sql(error)


def kinds() -> tuple[tuple[type[BaseException], int], ...]:
    """What is told in a sentence, and the exit code of each."""
    from orchestrator.api.client import ServerAway
    from orchestrator.contracts import (
        ClusterUnreachable,
        NoSuchVersion,
        RegistryConflict,
        RegistryUnreachable,
    )
    from orchestrator.home import HomeBusy
    from orchestrator.registry.server import ServerFailed
    from orchestrator.store.engine import StoreUnreachable
    from orchestrator.store.store import NoSuchJob
    from workers.manifest import CorruptFolder
    from workers.types import BadInput, Superseded

    return (
        (BadInput, USAGE),
        (Refused, REFUSED),
        (RegistryConflict, REFUSED),
        (HomeBusy, REFUSED),
        (Superseded, REFUSED),
        (NoSuchJob, NOT_FOUND),
        (NoSuchVersion, NOT_FOUND),
        (RegistryUnreachable, UNREACHABLE),
        (ServerFailed, UNREACHABLE),
        (ClusterUnreachable, UNREACHABLE),
        (StoreUnreachable, UNREACHABLE),
        (ServerAway, UNREACHABLE),
        (CorruptFolder, INTERNAL),
        (TaskFailed, INTERNAL),
        (DiskFull, INTERNAL),
    )


def _explain_os(error: OSError) -> tuple[int, str]:
    where = f" ({error.filename})" if error.filename else ""
    if is_full(error):
        return INTERNAL, f"the disk takes no more{where}; free some space and run the same command again"
    return INTERNAL, f"{error.strerror or error}{where}"


def _explain_sql(error: BaseException) -> tuple[int, str] | None:
    """The database's own words for a right that lacks, a full disk, a file that cannot be opened."""
    from sqlalchemy.exc import OperationalError, ProgrammingError

    if isinstance(error, ProgrammingError) and getattr(error.orig, "sqlstate", "") == NO_RIGHT:
        return UNREACHABLE, _lacking(str(error.orig))
    if not isinstance(error, OperationalError):
        return None
    if is_full(error):
        return INTERNAL, "the disk of this home takes no more; free some space and run the same command again"
    return INTERNAL, f"the database of this home cannot be used: {_one_line(error.orig or error)}"


def _lacking(words: str) -> str:
    """What an owner must grant the role that PostgreSQL refused with these words."""
    of_tables = ("ALL ON ALL TABLES IN SCHEMA public", "ALL ON ALL SEQUENCES IN SCHEMA public")
    lacks = ("USAGE, CREATE ON SCHEMA public",) if "for schema" in words else of_tables
    grants = "; ".join(f"GRANT {what} TO ROLE" for what in lacks)
    return (
        f"PostgreSQL does not let the role of this store do that ({words.splitlines()[0]}); have an owner of "
        f"the database run `{grants}`, with the role's name"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
