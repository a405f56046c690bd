"""Where checkpoints are kept beside the home, as the user says it. What speaks to it is imported then."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from workers.types import BadInput, CheckpointsAway

VARIABLE = "CHORUS_CHECKPOINTS"
"""s3://BUCKET/PREFIX, or another URL of fsspec's: an object store for checkpoints and finished adapters."""


def named(environment: Mapping[str, str] = os.environ) -> str:
    """The store's URL; empty if there is none."""
    return environment.get(VARIABLE, "").strip().rstrip("/")


def trouble(environment: Mapping[str, str] = os.environ) -> str | None:
    """Why what is named cannot be used, and what to do. Raises CheckpointsAway if it does not answer."""
    url = named(environment)
    if not url:
        return None
    from workers.object_store import problem, shown

    found = problem(url)
    return f"{VARIABLE}: {shown(url)} {found}" if found else None


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raises BadInput for a store that cannot be used as it is named.

    One that does not answer may do so later: what wants it then waits, and says so.
    """
    with suppress(CheckpointsAway):
        if found := trouble(environment):
            raise BadInput(found)
