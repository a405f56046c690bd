"""What a fusion did, in figures: `fusion.json`. No path and no time: it is equal wherever it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from torch import Tensor

from workers.fuse.certificate import ModuleReport

REPORT = "fusion.json"


class Overlap:
    """Running inner products of the adapters' unweighted deltas; `cosines` at the end."""

    def __init__(self, adapters: int) -> None:
        self.gram = [[0.0] * adapters for _ in range(adapters)]

    def add(self, inner: Sequence[Sequence[float]]) -> None:
        self.gram = [
            [x + y for x, y in zip(*rows, strict=True)] for rows in zip(self.gram, inner, strict=True)
        ]

    def cosines(self) -> list[list[float]]:
        """Cosine of every two adapters as one long vector each; 0 beside an adapter that adds nothing."""
        size = range(len(self.gram))
        length = [math.sqrt(max(self.gram[i][i], 0.0)) for i in size]
        return [
            [self.gram[i][j] / (length[i] * length[j]) if length[i] * length[j] else 0.0 for j in size]
            for i in size
        ]


class Spectrum:
    """Running sum over modules of s_j^2: what the whole adapter has in its j-th directions."""

    def __init__(self) -> None:
        self._squares: list[float] = []

    def add(self, spectrum: Tensor) -> None:
        squares = [float(value) for value in spectrum.square()]
        longer, shorter = sorted((self._squares, squares), key=len, reverse=True)
        self._squares = [x + y for x, y in zip_longest(longer, shorter, fillvalue=0.0)]

    def values(self) -> list[float]:
        return [math.sqrt(square) for square in self._squares]


def summary(reports: Mapping[str, ModuleReport]) -> dict[str, float]:
    """The same figures over the whole adapter: energies add up, the others are means over modules."""
    every = list(reports.values())
    total = math.fsum(report.norm_before**2 for report in every)
    error = math.sqrt(math.fsum(report.error**2 for report in every))
    after = math.fsum(report.norm_after**2 for report in every)
    whole = math.sqrt(after + error**2)
    means = ("effective_rank", "column_overlap", "row_overlap", "sign_conflict")
    return {
        "discarded_energy": error / whole if whole else 0.0,
        "error": error,
        "spectral_error": max(report.spectral_error for report in every),
        "norm_before": math.sqrt(total),
        "norm_after": math.sqrt(after),
        **{key: math.fsum(getattr(report, key) for report in every) / len(every) for key in means},
    }


def clamped(rank: int | None, reports: Mapping[str, ModuleReport]) -> list[str]:
    """Words for the modules whose rank had to stay below the one asked for."""
    small = {name: report.rank for name, report in reports.items() if rank and report.rank < rank}
    if not small:
        return []
    lowest, highest = min(small.values()), max(small.values())
    ranks = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    return [f"rank {rank} is more than {len(small)} modules can have; they have their full rank, {ranks}"]


def as_json(reports: Mapping[str, ModuleReport]) -> dict[str, dict[str, Any]]:
    return {name: asdict(report) for name, report in reports.items()}
