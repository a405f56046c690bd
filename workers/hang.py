"""After how long silence means death: of a rank, of a controller. Standard library only: both sides read."""

from __future__ import annotations

import os
from collections.abc import Mapping

from workers.types import BadInput

VARIABLE = "CHORUS_HANG_SECONDS"
DEFAULT = 120.0
ORPHAN_VARIABLE = "CHORUS_HOST_ORPHAN_SECONDS"
ORPHAN_DEFAULT = 3600.0
LEAST = 1.0
ROUND = 5.0


def hang_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Of a collective on a peer, and of the orchestrator on rank 0; torch's own default is 30 minutes.

    Raises BadInput for a value that is no number of seconds.
    """
    return _seconds(environment, VARIABLE, DEFAULT)


def round_seconds() -> float:
    """Longest wait of the peers in one collective while rank 0 alone does what may take minutes: a peer that
    waits for long takes rank 0 for dead."""
    return min(ROUND, hang_seconds() / 4)


def orphan_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Of a host that has nothing to do on a controller: then it ends itself and gives its GPUs back.

    Raises BadInput for a value that is no number of seconds.
    """
    return _seconds(environment, ORPHAN_VARIABLE, ORPHAN_DEFAULT)


def _seconds(environment: Mapping[str, str], variable: str, default: float) -> float:
    text = environment.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not LEAST <= seconds < float("inf"):
        raise BadInput(f"{variable} is {text!r}; set it to a number of seconds from {LEAST:.0f} on, like 90")
    return seconds
