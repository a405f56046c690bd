"""After how long a rank that says nothing is taken for hung. Standard library only: both sides read it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from workers.types import BadInput

VARIABLE = "CHORUS_HANG_SECONDS"
DEFAULT = 120.0
LEAST = 1.0


def hang_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Of a collective on a peer, and of the orchestrator on rank 0; torch's own default is 30 minutes.

    Raises BadInput for a value that is no number of seconds.
    """
    text = environment.get(VARIABLE, str(DEFAULT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not LEAST <= seconds < float("inf"):
        raise BadInput(f"{VARIABLE} is {text!r}; set it to a number of seconds from {LEAST:.0f} on, like 90")
    return seconds
