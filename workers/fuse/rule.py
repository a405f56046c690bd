"""What a fusion rule is: a function from one module's shares to one product. Types only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from workers.fuse.factors import Core, Factors
from workers.fuse.normal import Module
from workers.rules import Row
from workers.types import RuleOptions


@dataclass(frozen=True)
class Options(RuleOptions):
    """A plan's options as a rule reads them. Cutting to a rank is done for all rules at one place, `cut`."""

    rank: int | None = None

    @property
    def kept(self) -> float:
        """Density: the share of entries kept."""
        return 0.5 if self.density is None else self.density


@dataclass(frozen=True)
class Fused:
    """A module's result, and what was left out of it: the singular values that were cut, in falling order."""

    factors: Factors
    discarded_energy: float
    """sqrt(sum_{i>R} s_i^2 / sum_i s_i^2) of the rule's result before it was cut, from 0 to 1."""
    error: float = 0.0
    """Frobenius norm of what was cut: the distance between the result and the rule's own."""
    spectral_error: float = 0.0
    """Largest singular value that was cut: no unit input is answered further off."""
    spectrum: Tensor | None = None
    """Singular values of `factors`, in falling order, where cutting found them."""


Apply = Callable[[Module, Options], Factors | Core]
Merge = Callable[[Tensor, Tensor, Options, int], Tensor]
"""(deltas [T, ...], weights [T], options, seed) -> merged [...]: a rule that works entry by entry."""


Turns = Literal["both", "left", "none"]
"""Which sides of the deltas may be turned before, so that a rule works on small matrices: with both it gives
Q f(D_1, ..., D_T) P^T for Q D_i P^T, Q and P with orthonormal columns."""


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules, with what computes it."""

    apply: Apply
    row: Row
    turns: Turns

    @property
    def takes_rank(self) -> bool:
        return self.row.takes_rank

    @property
    def words(self) -> str:
        return self.row.words
