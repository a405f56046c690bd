"""What a fusion rule is: a function from one module's shares to one product. Types only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.fuse.factors import Factors
from workers.fuse.normal import Module


@dataclass(frozen=True)
class Options:
    """What a plan may set beside the weights. A rule reads what its row in the table says it takes."""

    rank: int | None = None


@dataclass(frozen=True)
class Fused:
    """A rule's result for one module, and the part of the target it had to leave out, from 0 to 1."""

    factors: Factors
    discarded_energy: float


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    apply: Callable[[Module, Options], Fused]
    takes_rank: bool
    """True: a rank must be given. False: the rule decides the rank, and giving one is refused."""
    words: str
