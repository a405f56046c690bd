"""One layer's updates for neighbouring jobs, forward and back: the mathematics of LoRA, written once.

    y += s (x A^T) B^T                                (LoRA, arXiv 2106.09685 equation 3, s = alpha / r)
    with g = dL/dy:  dB = s g^T (x A^T),  dA = (s g B)^T x,  dx += (s g B) A

In exact arithmetic every product and sum is rounded where PEFT rounds it: s multiplies the wide [N, O]
result, unless it is a power of two, when it may as well multiply the narrow [N, r] one. In fused arithmetic it
always multiplies the narrow one, and what can be added in place is added in place.
Shapes: N tokens, J jobs; D features in, O features out; r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.products import Batched, Grouped
from workers.slots import Factors

Arithmetic = Literal["exact", "fused"]


class Kept(NamedTuple):
    """What the way back needs of the way there: A [J, r, D], B [J, O, r], x A^T [N, r]."""

    a_JrD: Tensor
    b_JOr: Tensor
    down_Nr: Tensor


@dataclass(frozen=True)
class Run:
    """Neighbouring segments whose updates are computed at once, in tokens [start, stop)."""

    start: int
    stop: int
    factors: tuple[Factors, ...]
    products: Batched | Grouped
    arithmetic: Arithmetic
    rank: int
    mask_ND: Tensor | None = None
    """Dropout's multiplier; None without dropout."""

    @property
    def scales_narrow(self) -> bool:
        return self.arithmetic == "fused" or all(f.scaling_is_exact for f in self.factors)

    def add_update(self, x_ND: Tensor, y_NO: Tensor) -> Kept:
        """Add the run's updates to its tokens of y, in place."""
        a_JrD, b_JOr = self._stacked()
        down_Nr = self.products.by_rows(self._input(x_ND), a_JrD)
        into = y_NO[self.start : self.stop]
        if self.scales_narrow:
            down_Nr = self._scaled(down_Nr)
            self._add(into, down_Nr, b_JOr.transpose(1, 2))
        else:
            into += self._scaled(self.products.by_rows(down_Nr, b_JOr))
        return Kept(a_JrD, b_JOr, down_Nr)

    def add_gradients(self, x_ND: Tensor, grad_NO: Tensor, kept: Kept, dx_ND: Tensor | None) -> None:
        """Add dA and dB to the slots' buffers, and the run's part of dx to dx, in place."""
        grad_NO = grad_NO[self.start : self.stop].to(kept.a_JrD.dtype)
        if self.scales_narrow:
            d_down_Nr = self._scaled(self.products.by_columns(grad_NO, kept.b_JOr))
        else:
            grad_NO = self._scaled(grad_NO)
            d_down_Nr = self.products.by_columns(grad_NO, kept.b_JOr)
        da_JrD = self.products.outer(d_down_Nr, self._input(x_ND))
        db_JOr = self.products.outer(grad_NO, kept.down_Nr)
        for factors, da, db in zip(self.factors, da_JrD, db_JOr, strict=True):
            factors.a_grad += da[: factors.r]
            factors.b_grad += db[:, : factors.r]
        if dx_ND is None:
            return
        if self.mask_ND is None:
            self._add(dx_ND[self.start : self.stop], d_down_Nr, kept.a_JrD)
        else:
            dx_ND[self.start : self.stop] += self.products.by_columns(d_down_Nr, kept.a_JrD) * self.mask_ND

    def _add(self, into_NM: Tensor, x_NK: Tensor, w_JKM: Tensor) -> None:
        if self.arithmetic == "fused" and len(self.factors) == 1:
            into_NM.addmm_(x_NK, w_JKM[0])
        else:
            into_NM += self.products.by_columns(x_NK, w_JKM)

    def _input(self, x_ND: Tensor) -> Tensor:
        """The run's tokens, in the adapters' precision, dropped out."""
        x_ND = x_ND[self.start : self.stop].to(self.factors[0].a.dtype)
        return x_ND if self.mask_ND is None else x_ND * self.mask_ND

    def _scaled(self, x_NK: Tensor) -> Tensor:
        scaling = [f.scaling for f in self.factors]
        if len(set(scaling)) == 1:
            return x_NK if scaling[0] == 1 else x_NK * scaling[0]
        return x_NK * self.products.per_token(x_NK.new_tensor(scaling), len(x_NK))

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Every job's A and B as one tensor; a lower rank than the run's is filled up with zeros."""
        if len(self.factors) == 1:
            return self.factors[0].a.unsqueeze(0), self.factors[0].b.unsqueeze(0)
        a = [F.pad(f.a, (0, 0, 0, self.rank - f.r)) if f.r < self.rank else f.a for f in self.factors]
        b = [F.pad(f.b, (0, self.rank - f.r)) if f.r < self.rank else f.b for f in self.factors]
        return torch.stack(a), torch.stack(b)


def join(runs: Sequence[Run]) -> list[Run]:
    """Neighbours that one batched product can serve, as one run. `runs` have a job each, in token order."""
    groups: list[list[Run]] = []
    for run in runs:
        if groups and _alike(groups[-1][-1], run):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def bucket(r: int) -> int:
    """The rank as which a grouped product takes `r`: the next of 8, 16, 32, 64, ..."""
    return max(8, 1 << (r - 1).bit_length())


def _alike(left: Run, right: Run) -> bool:
    """Whether two runs may be one. An exact product keeps its bits only among equals."""
    if left.stop != right.start or left.mask_ND is not None or right.mask_ND is not None:
        return False
    if left.arithmetic == "fused":
        return bucket(left.rank) == bucket(right.rank)
    same_size = left.stop - left.start == right.stop - right.start
    return same_size and left.rank == right.rank and left.scales_narrow == right.scales_narrow


def _joined(runs: Sequence[Run]) -> Run:
    first, last = runs[0], runs[-1]
    factors = tuple(run.factors[0] for run in runs)
    if first.arithmetic == "exact":
        return Run(first.start, last.stop, factors, Batched(len(runs)), "exact", first.rank)
    ends = torch.tensor([run.stop - first.start for run in runs], dtype=torch.int32)
    products = Grouped(ends.to(factors[0].a.device, non_blocking=True))
    return Run(first.start, last.stop, factors, products, "fused", bucket(first.rank))
