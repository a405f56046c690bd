"""CPU tasks, files in and files out: fusion and export. Runs in any process; holds no base and no Ray."""

from __future__ import annotations

from typing import Any

from workers.export import export
from workers.fuse import fuse_folders
from workers.progress import Tell, silent
from workers.types import FuseTask, Task


def run(task: Task, tell: Tell = silent) -> dict[str, Any]:
    """Do `task` and return its report, JSON values only. `tell` hears of modules fused, or shards written.

    Raises BadInput for what a user did, `workers.manifest.CorruptFolder` for altered files, and OSError,
    a full disk among it; in every case no folder is left behind.
    """
    return fuse_folders(task, tell) if isinstance(task, FuseTask) else export(task, tell)
