"""What a fusion did, in figures: `fusion.json`. No path and no time: it is equal wherever it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workers.fuse.factors import Factors, inner, norm
from workers.fuse.normal import Module
from workers.fuse.rule import Fused

REPORT = "fusion.json"


@dataclass(frozen=True)
class ModuleReport:
    """One module before and after. Norms are Frobenius norms of the delta added to the base weight."""

    rank: int
    discarded_energy: float
    """sqrt(sum_{i>R} s_i^2 / sum_i s_i^2), from 0 to 1."""
    norm_before: float
    """Of the exact weighted sum."""
    norm_after: float


def module_report(module: Module, fused: Fused) -> ModuleReport:
    rank = fused.factors.a.shape[0]
    before = norm(module.stacked())
    return ModuleReport(rank, fused.discarded_energy, before, norm(fused.factors))


class Overlap:
    """Running inner products of the adapters' unweighted deltas; `cosines` at the end."""

    def __init__(self, adapters: int) -> None:
        self.gram = [[0.0] * adapters for _ in range(adapters)]

    def add(self, shares: Sequence[Factors]) -> None:
        for i, one in enumerate(shares):
            for j, other in enumerate(shares):
                self.gram[i][j] += inner(one, other)

    def cosines(self) -> list[list[float]]:
        """Cosine of every two adapters as one long vector each; 0 beside an adapter that adds nothing."""
        size = range(len(self.gram))
        length = [math.sqrt(max(self.gram[i][i], 0.0)) for i in size]
        return [
            [self.gram[i][j] / (length[i] * length[j]) if length[i] * length[j] else 0.0 for j in size]
            for i in size
        ]


def summary(reports: Mapping[str, ModuleReport]) -> dict[str, float]:
    """The same figures over the whole adapter, every module's energy counted."""
    total = math.fsum(report.norm_before**2 for report in reports.values())
    lost = math.fsum((report.discarded_energy * report.norm_before) ** 2 for report in reports.values())
    after = math.fsum(report.norm_after**2 for report in reports.values())
    return {
        "discarded_energy": math.sqrt(lost / total) if total else 0.0,
        "norm_before": math.sqrt(total),
        "norm_after": math.sqrt(after),
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
