"""How far a CPU task is, as it tells it: a count, kept in a file that whoever shares the folder can read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from workers.types import Progress

Tell = Callable[[int, int], None]
"""(done, total): called as the count grows."""
TELL_SECONDS = 0.2


def silent(done: int, total: int) -> None:
    """Told to nobody."""


class ProgressFile:
    """Keeps the latest count in a file: written every TELL_SECONDS at most, and at the last one."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._next = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        if done < total and self._clock() < self._next:
            return
        self._next = self._clock() + TELL_SECONDS
        scratch = self._path.with_name(f".{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps([done, total]))
            scratch.replace(self._path)
        except OSError:
            pass  # a task does not fail for want of being watched


def read_progress(path: Path) -> Progress | None:
    """None before anything was told."""
    try:
        done, total = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return Progress(done, total)
