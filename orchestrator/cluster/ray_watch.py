"""`python -m orchestrator.cluster.ray_watch FOLDER`: end a local Ray when its driver has gone, by any way.

The kernel ends Ray's servers with the driver that started them, but two of the raylet's agents outlive it
by a minute (seen with 2.60), and so may a stopped worker. Every process of one local Ray, and what it starts,
has a log below FOLDER open for writing. This one reads its standard input, which the driver holds open; at
its end it kills those processes and removes FOLDER. Never `ray stop`: that ends every Ray on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

QUIET_SECONDS = 1.0
"""A fork may escape one look at the process table; so long must pass without finding any."""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A watcher of this process; closing its `stdin`, or dying, sets it off."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cluster.ray_watch", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def writers(folder: Path) -> Iterator[psutil.Process]:
    """Processes that have a file below `folder` open for writing; one who only reads a log is left alone."""
    for process in psutil.process_iter():
        try:
            files = process.open_files()
        except (psutil.Error, OSError):
            continue
        if any(Path(file.path).is_relative_to(folder) and file.mode != "r" for file in files):
            yield process


def main(folder: Path) -> None:
    driver = os.getppid()
    sys.stdin.buffer.read()
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < QUIET_SECONDS:
        for process in writers(folder):
            # After a clean shutdown the driver lives on, its own log still open.
            if process.pid == driver:
                continue
            quiet_since = time.monotonic()
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
