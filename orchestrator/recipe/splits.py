"""The data a job reads in one role, every row checked before anything is started.

What a row must hold is `workers.rows`' to say, so that a recipe is refused here for what a host would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.rows import data_digest, read_rows
from workers.types import DatasetSpec


@dataclass(frozen=True)
class Split:
    """The data sets one job reads in one role, and what their files held when they were checked."""

    datasets: tuple[DatasetSpec, ...] = ()
    rows: int = 0
    digest: str = ""
    """SHA-256 over the files' bytes, in order; empty without data."""


def check_split(datasets: Sequence[DatasetSpec]) -> Split:
    """Check every row that the data sets would use. Raises BadInput naming file, line and field."""
    if not datasets:
        return Split()
    return Split(tuple(datasets), sum(len(read_rows(spec)) for spec in datasets), data_digest(datasets))
