"""Real faults: a disk that takes no more, and a process killed at the worst moment."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

KILLED_BEFORE_RENAME = """
import os, pathlib, signal
pathlib.Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
from workers.task import run
from workers.types import ExportTask, FuseTask, RuleOptions
run({task!r})
"""


@contextmanager
def files_limited_to(size: int) -> Generator[None]:
    """No file of this process grows beyond `size` bytes: writes fail as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_killed_before_rename(task: object) -> int:
    """Run a CPU task in its own process, killed when all is written and nothing published: exit status."""
    script = KILLED_BEFORE_RENAME.format(task=task)
    return subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode
