"""What keeps a write from being durable, as a value: a full disk stops a job, not its host."""

from __future__ import annotations

import errno
from collections.abc import Callable

from workers.types import CheckpointsAway, StopCode

Problem = tuple[StopCode, str]
"""What stops a job, and the words for it."""


def written(write: Callable[[], object]) -> Problem | None:
    """What kept `write` from the disk, or from the object store."""
    try:
        write()
    except CheckpointsAway as error:
        return "checkpoints_away", f"cannot save: {error}"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return ("disk_full" if full else "internal_error", f"cannot save: {error}")
    return None
