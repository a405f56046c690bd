"""One layer's updates for neighbouring jobs, forward and back: the mathematics of LoRA.

    y += s (x A^T) B^T                                (LoRA, arXiv 2106.09685 equation 3, s = alpha / r)
    with g = dL/dy:  dB = s g^T (x A^T),  dA = (s g B)^T x,  dx += (s g B) A

Two arithmetics. `ExactRun` rounds every product and sum where PEFT rounds it, so that a job's bits are those
of plain PEFT. `FusedRun` scales the narrow [N, r] product instead of the wide one, reads B transposed, which
a narrow product much prefers, and adds in place what it can. Tests hold each to its contract.
Shapes: N tokens, J jobs; D features in, O features out; r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.arena import Neighbours
from workers.head import SAME_KERNEL_ROWS
from workers.products import Batched, Grouped
from workers.slots import Factors


class Kept(NamedTuple):
    """What the way back needs of the way there: the stacked A and B, and x A^T [N, r]."""

    a: Tensor
    b: Tensor
    down_Nr: Tensor


@dataclass(frozen=True)
class Run(ABC):
    """Neighbouring segments whose updates are computed at once, in tokens [start, stop)."""

    start: int
    stop: int
    factors: tuple[Factors, ...]
    products: Batched | Grouped
    rank: int
    mask_ND: Tensor | None = None
    """Dropout's multiplier; None without dropout. A run with one has a single job."""

    @abstractmethod
    def add_update(self, x_ND: Tensor, y_NO: Tensor) -> Kept:
        """Add the run's updates to its tokens of y, in place."""

    @abstractmethod
    def add_gradients(self, x_ND: Tensor, grad_NO: Tensor, kept: Kept, dx_ND: Tensor | None) -> None:
        """Add dA and dB to the slots' buffers; put the run's part of dx into its tokens of dx, in place.

        `dx` is what `new_dx` made: exact runs write, fused ones add to the base's part.
        """

    @abstractmethod
    def alike(self, other: Run) -> bool:
        """Whether the two may be one run."""

    @cached_property
    def a(self) -> Neighbours:
        return Neighbours([f.a for f in self.factors])

    @cached_property
    def b(self) -> Neighbours:
        return Neighbours([f.b for f in self.factors])

    @cached_property
    def a_grad(self) -> Neighbours:
        """Where each job's dA is summed."""
        return Neighbours([f.a_grad for f in self.factors])

    @cached_property
    def b_grad(self) -> Neighbours:
        return Neighbours([f.b_grad for f in self.factors])

    @cached_property
    def scalings(self) -> tuple[float, ...]:
        return tuple(f.scaling for f in self.factors)

    @cached_property
    def scaling_is_exact(self) -> bool:
        return all(f.scaling_is_exact for f in self.factors)

    def follows(self, other: Run) -> bool:
        return other.stop == self.start and self.mask_ND is None and other.mask_ND is None

    def _input(self, x_ND: Tensor) -> Tensor:
        """The run's tokens, in the adapters' precision, dropped out."""
        x_ND = x_ND[self.start : self.stop].to(self.factors[0].a.dtype)
        return x_ND if self.mask_ND is None else x_ND * self.mask_ND

    def _scaled(self, x_NK: Tensor) -> Tensor:
        first = self.scalings[0]
        if self.scalings.count(first) == len(self.scalings):
            return x_NK if first == 1 else x_NK * first
        return x_NK * self.products.per_token(x_NK.new_tensor(self.scalings), len(x_NK))

    def _dropped(self, dx_ND: Tensor) -> Tensor:
        return dx_ND if self.mask_ND is None else dx_ND * self.mask_ND


class ExactRun(Run):
    """PEFT's operations in PEFT's order. s may move to the narrow product if it is a power of two."""

    def add_update(self, x_ND: Tensor, y_NO: Tensor) -> Kept:
        a_JrD, b_JOr = self.a.read(), self.b.read()
        down_Nr = self.products.by_rows(self._input(x_ND), a_JrD)
        down_Nr = self._scaled(down_Nr) if self.scaling_is_exact else down_Nr
        update_NO = self.products.by_rows(down_Nr, b_JOr)
        y_NO[self.start : self.stop] += update_NO if self.scaling_is_exact else self._scaled(update_NO)
        return Kept(a_JrD, b_JOr, down_Nr)

    def add_gradients(self, x_ND: Tensor, grad_NO: Tensor, kept: Kept, dx_ND: Tensor | None) -> None:
        grad_NO = grad_NO[self.start : self.stop].to(kept.a.dtype)
        grad_NO = grad_NO if self.scaling_is_exact else self._scaled(grad_NO)
        d_down_Nr = self.products.by_columns(grad_NO, kept.b)
        d_down_Nr = self._scaled(d_down_Nr) if self.scaling_is_exact else d_down_Nr
        da_JrD = self.products.outer(d_down_Nr, self._input(x_ND))
        db_JOr = self.products.outer(grad_NO, kept.down_Nr)
        self.a_grad.add(da_JrD)
        self.b_grad.add(db_JOr)
        if dx_ND is None:
            return
        dx_ND = dx_ND[self.start : self.stop]
        if self.mask_ND is None and dx_ND.dtype == kept.a.dtype:
            self.products.by_columns(d_down_Nr, kept.a, out_NM=dx_ND)
        else:
            dx_ND.copy_(self._dropped(self.products.by_columns(d_down_Nr, kept.a)))

    def alike(self, other: Run) -> bool:
        """Among equals that are not too few rows alone does a batched product keep every job's bits."""
        rows = self.stop - self.start
        same_size = rows == other.stop - other.start and rows >= SAME_KERNEL_ROWS
        return same_size and self.rank == other.rank and self.scaling_is_exact == other.scaling_is_exact


class FusedRun(Run):
    """Fewest passes over wide tensors. Ranks of one bucket go together, filled up with zeros."""

    def add_update(self, x_ND: Tensor, y_NO: Tensor) -> Kept:
        a_JrD, b_JrO = self._filled(self.a), self._filled(self.b)
        down_Nr = self._scaled(self.products.by_rows(self._input(x_ND), a_JrD))
        self.products.add_by_columns(y_NO[self.start : self.stop], down_Nr, b_JrO)
        return Kept(a_JrD, b_JrO, down_Nr)

    def add_gradients(self, x_ND: Tensor, grad_NO: Tensor, kept: Kept, dx_ND: Tensor | None) -> None:
        grad_NO = grad_NO[self.start : self.stop].to(kept.a.dtype)
        d_down_Nr = self._scaled(self.products.by_rows(grad_NO, kept.b))
        da_JrD = self.products.outer(d_down_Nr, self._input(x_ND))
        db_JrO = self.products.outer(kept.down_Nr, grad_NO)
        self._cut_and_add(self.a_grad, da_JrD)
        self._cut_and_add(self.b_grad, db_JrO)
        if dx_ND is None:
            return
        if self.mask_ND is None:
            self.products.add_by_columns(dx_ND[self.start : self.stop], d_down_Nr, kept.a)
        else:
            dx_ND[self.start : self.stop] += self._dropped(self.products.by_columns(d_down_Nr, kept.a))

    def alike(self, other: Run) -> bool:
        return bucket(self.rank) == bucket(other.rank)

    def _filled(self, factors: Neighbours) -> Tensor:
        """[J, r, K] at the run's rank."""
        if all(f.r == self.rank for f in self.factors):
            return factors.read()
        return torch.stack([F.pad(x_rK, (0, 0, 0, self.rank - len(x_rK))) for x_rK in factors.each])

    def _cut_and_add(self, gradients: Neighbours, x_JrK: Tensor) -> None:
        if gradients.all is not None:
            gradients.add(x_JrK[:, : self.factors[0].r])
        else:
            cut = [x_rK[: f.r] for f, x_rK in zip(self.factors, x_JrK, strict=True)]
            torch._foreach_add_(gradients.each, cut)

    @cached_property
    def b(self) -> Neighbours:
        """Transposed, as fused slots have it."""
        return Neighbours([f.b.t() for f in self.factors])

    @cached_property
    def b_grad(self) -> Neighbours:
        return Neighbours([f.b_grad.t() for f in self.factors])


def new_dx(runs: Sequence[Run], x_ND: Tensor) -> Tensor:
    """Where the runs put the adapters' part of dx: zero in the tokens of no run, unset in theirs."""
    covered = sum(run.stop - run.start for run in runs) == len(x_ND)
    return torch.empty_like(x_ND) if covered and isinstance(runs[0], ExactRun) else torch.zeros_like(x_ND)


def join(runs: Sequence[Run]) -> list[Run]:
    """Neighbours that one batched product can serve, as one run. `runs` have a job each, in token order."""
    groups: list[list[Run]] = []
    for run in runs:
        last = groups[-1][-1] if groups else None
        if last is not None and run.follows(last) and run.alike(last):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def bucket(r: int) -> int:
    """The rank as which a grouped product takes `r`: the next of 8, 16, 32, 64, ..."""
    return max(8, 1 << (r - 1).bit_length())


def _joined(runs: Sequence[Run]) -> Run:
    first, last = runs[0], runs[-1]
    factors = tuple(run.factors[0] for run in runs)
    if len({(run.stop - run.start, run.rank) for run in runs}) == 1:
        return type(first)(first.start, last.stop, factors, Batched(len(runs)), first.rank)
    ends = torch.tensor([run.stop - first.start for run in runs], dtype=torch.int32)
    products = Grouped(ends.to(factors[0].a.device, non_blocking=True))
    return type(first)(first.start, last.stop, factors, products, bucket(first.rank))
