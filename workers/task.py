"""CPU tasks, files in and files out: fusion and export. Runs in any process; holds no base and no Ray."""

from __future__ import annotations

from typing import Any

from workers.progress import Tell, silent
from workers.types import FuseTask, Task


def run(task: Task, tell: Tell = silent) -> dict[str, Any]:
    """Do `task` and return its report, JSON values only. `tell` hears of modules fused, or shards written.

    Raises BadInput for what a user did, `workers.manifest.CorruptFolder` for altered files, and OSError,
    a full disk among it; in every case no folder is left behind.
    """
    # Each imports what it needs: fusion is done without transformers, whose import takes as long as torch's.
    if isinstance(task, FuseTask):
        from workers.fuse import fuse_folders

        return fuse_folders(task, tell)
    from workers.export import export

    return export(task, tell)
