"""The folder of one chorus: where its files lie, and who may run jobs in it. Standard library only.

Owns the lock that keeps two `chorus run` apart. The kernel drops it however its holder
ends, so it is never stale.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import parse_qs, urlsplit

STORE_VARIABLE = "CHORUS_STORE"
PATIENCE = 1.0
"""Seconds a lock is asked for: a command that only looks at it holds it for a moment."""


class HomeBusy(Exception):
    """Another `chorus run` or `chorus serve` works in this home."""


@dataclass(frozen=True)
class Home:
    """Paths below one folder; nothing is made before it is needed."""

    folder: Path
    store: str | None = None
    """URL of the store if it is not the home's own SQLite file; it may hold a password."""

    @property
    def database(self) -> Path:
        return self.folder / "chorus.db"

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.database}"

    @property
    def has_store(self) -> bool:
        """Whether something may have been submitted: a look at it then makes nothing new."""
        return self.store is not None or self.database.is_file()

    @property
    def registry_lock(self) -> Path:
        """Kept by the one command that moves an alias."""
        return self.folder / "registry.lock"

    @property
    def run_lock(self) -> Path:
        return self.folder / "run.lock"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "chorus.log"

    @property
    def background_log(self) -> Path:
        """What `chorus run --no-follow` would have printed."""
        return self.folder / "logs" / "run.log"

    @property
    def environment(self) -> dict[str, str]:
        """How a process of our own is told of the store: not on its command line, which others can read."""
        return {STORE_VARIABLE: self.store} if self.store else {}

    @property
    def downloads(self) -> Path:
        return self.folder / "downloads"

    def folder_flag(self) -> str:
        """How a command that needs no store is told to use this home; empty for the default one."""
        return "" if self.folder == Path(".chorus").absolute() else f" --home {shlex.quote(str(self.folder))}"

    def flag(self) -> str:
        """How a command is told to use this home and its store; empty for the default ones.

        A URL that holds a password is not written out: the shell puts in what CHORUS_STORE is set to.
        """
        if self.store is None:
            return self.folder_flag()
        url = f'"${STORE_VARIABLE}"' if _has_password(self.store) else shlex.quote(self.store)
        return f"{self.folder_flag()} --store {url}"

    @contextmanager
    def claim(self) -> Generator[None]:
        """Be the one that runs jobs here. Raises HomeBusy naming the other's process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.run_lock.open("a+") as file:
            if not _locked(file):
                file.seek(0)
                other = file.read().strip() or "unknown"
                raise HomeBusy(
                    f"another `chorus run` or `chorus serve` (process {other}) works in {self.folder}; "
                    "wait for it, or give this one a --home of its own"
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def claimed(self) -> bool:
        """Whether a `chorus run` or `chorus serve` works here now."""
        try:
            with self.run_lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def _locked(file: IO[str]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True
