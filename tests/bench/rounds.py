"""Timing by turns: A B C D, A B C D, ..., so that a machine that slows down slows all of them.

Ratios are taken round by round, within one run; what is quoted is a median, with the least and the greatest.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from workers.ranks import Ranks


@dataclass(frozen=True)
class System:
    """`run(n)` does n units of work; `units` of them are one round of the whole load."""

    name: str
    run: Callable[[int], None]
    sampled: int
    """Units one timing does."""
    units: float


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.greatest:.3g})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


Seconds = dict[str, list[float]]
"""System -> seconds for the whole load, one entry a round."""


def interleaved(systems: Sequence[System], rounds: int, ranks: Ranks, least_seconds: float = 0.3) -> Seconds:
    """Collective. Each timing repeats its work until it is expected to take `least_seconds`."""
    repeats = {system.name: _warm_up(system, ranks, least_seconds) for system in systems}
    seconds: Seconds = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            units = system.sampled * repeats[system.name]
            seconds[system.name].append(_timed(system, units, ranks) / units * system.units)
    return seconds


def _warm_up(system: System, ranks: Ranks, least_seconds: float) -> int:
    """Two runs for DeepSpeed's trace and the allocator, a third to see how long one takes."""
    for _ in range(2):
        system.run(system.sampled)
    took = _timed(system, system.sampled, ranks)
    return int(ranks.broadcast(max(1, math.ceil(least_seconds / took))))


def _timed(system: System, units: int, ranks: Ranks) -> float:
    gc.collect()
    _meet(ranks)
    started = time.perf_counter()
    system.run(units)
    _meet(ranks)
    return time.perf_counter() - started


def _meet(ranks: Ranks) -> None:
    """Returns when every rank is here and the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ranks.gather(None)


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> Spread:
    """How many times longer `slow` takes than `fast`, round by round."""
    return spread([s / f for s, f in zip(seconds[slow], seconds[fast], strict=True)])
