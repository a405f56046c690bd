"""Whether an error means that a disk is full, and how much room a folder has. Standard library only."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})
POSTGRESQL_FULL = "53100"
SCARCE_BYTES = 16_000_000
"""With less than this free, a full disk is the likely cause of what another program failed at."""


def is_full(error: BaseException) -> bool:
    """Whether `error` (the system's, a database's, SQLAlchemy's around one) says that a disk is full."""
    cause = getattr(error, "orig", error)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", None) in SQLITE_FULL
    if getattr(cause, "sqlstate", None) == POSTGRESQL_FULL:
        return True
    return isinstance(cause, OSError) and cause.errno in FULL


def room(folder: Path) -> str:
    """`<folder> has 1.5 MB free`, also for a folder that is still to be made."""
    return f"{folder} has {_free(folder) / 1e6:.1f} MB free"


def scarce(folder: Path) -> str:
    """`; <folder> has 1.5 MB free` if that may be why something failed, else nothing."""
    return f"; {room(folder)}" if _free(folder) < SCARCE_BYTES else ""


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
