"""What a run that was killed leaves behind, put away before the next one starts.

The locks of the run and of the MLflow server go with their holders; a local Ray is ended by its watcher. What
remains: wait for that watcher, so that no old rank writes beside a new one, and remove unpublished folders.
On a Ray that exists hosts live on; the controller takes them over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from workers.manifest import remove_scratch

HOME_VARIABLE = "CHORUS_RAY_HOME"
"""Inherited by every process of a home's Ray: how a watcher is known to belong to it."""
WATCHER = "orchestrator.cluster.ray_watch"
WATCHER_SECONDS = 20.0


def await_watchers(home: Path, seconds: float = WATCHER_SECONDS) -> None:
    """Wait until the watchers of former runs have ended their Ray and gone."""
    deadline = time.monotonic() + seconds
    while any(watchers(home)) and time.monotonic() < deadline:
        time.sleep(0.1)


def watchers(home: Path) -> Iterator[psutil.Process]:
    """Processes that watch a Ray of this home."""
    for process in psutil.process_iter():
        try:
            if WATCHER in process.cmdline() and process.environ().get(HOME_VARIABLE) == str(home):
                yield process
        except (psutil.Error, OSError):
            continue


def remove_unpublished(home: Path, releases: Iterable[Path], hosts_live: bool = False) -> None:
    """Remove the scratch folders of killed writers, in `home` and beside the releases about to be written.

    `hosts_live`: hosts may be writing checkpoints and searched fusions just now, and clean up by themselves.
    """
    written_by_hosts = [home / "fusions", *(home / "checkpoints").glob("*")]
    for parent in (home / "downloads", *([] if hosts_live else written_by_hosts)):
        remove_scratch(parent)
    for release in releases:
        for path in release.parent.glob(f".{release.name}.*"):
            if path.is_dir() and len(path.suffix) == 33:
                shutil.rmtree(path, ignore_errors=True)
