"""One module in the coordinates of its adapters' joint spaces: small, and the same to a rule that rotates.

Legend: M out_features, N in_features, K sum of the adapters' ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.fuse.factors import Factors, gram_matrix
from workers.fuse.normal import Module
from workers.fuse.rule import Turns

WELL = 1e-5
"""R's smallest diagonal entry over its largest, from which on B R^-1 is orthonormal to some 1e-11."""
FAR = 1e-3
"""The same for columns of length 1, where R comes from B^T B, which squares what rounding does: to 1e-10."""


@dataclass(frozen=True)
class Reduced:
    """Of `whole` with D_i = Q_b R_b,i R_a,i^T Q_a^T: `module` has the shares R_b,i R_a,i^T."""

    whole: Module
    module: Module
    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]

    def turned(self, turns: Turns) -> Module:
        """The module as far as a rule lets it be turned."""
        if turns == "left":
            shares = zip(self.whole.shares, self.module.shares, strict=True)
            return replace(self.whole, shares=tuple(Factors(full.a, low.b) for full, low in shares))
        return self.module if turns == "both" else self.whole

    def back(self, factors: Factors, turns: Turns) -> Factors:
        """A result in these coordinates, in the module's own."""
        a = self.right(factors.a.T).T if turns == "both" else factors.a
        return Factors(a, factors.b if turns == "none" else self.left(factors.b))


def reduced(module: Module) -> Reduced:
    """QR of [B_i] and of [A_i^T], without their Q: once, O((M + N) K^2), and all that follows is O(K^3)."""
    ranks = [share.a.shape[0] for share in module.shares]
    low_b, left = _side(torch.cat([share.b for share in module.shares], dim=1))
    low_a, right = _side(torch.cat([share.a for share in module.shares]).T)
    shares = zip(low_a.T.split(ranks), low_b.split(ranks, dim=1), strict=True)
    low = replace(module, shares=tuple(Factors(a, b) for a, b in shares))
    return Reduced(module, low, left, right)


def _side(columns: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R and the map x -> Q x; as B (R^-1 x) where B's columns are far from dependent."""
    if columns.shape[0] <= columns.shape[1]:
        return columns, lambda x: x
    r = _by_cholesky(columns)
    if r is None:
        r = torch.linalg.qr(columns, mode="r")[1]
        if not _spread(r) > WELL:
            q, r = torch.linalg.qr(columns)
            return r, lambda x: q @ x
    # As (x^T B^T)^T: MKL takes half the time for a product that is wide.
    return r, lambda x: (torch.linalg.solve_triangular(r, x, upper=True).T @ columns.T).T


def _by_cholesky(columns: Tensor) -> Tensor | None:
    """R by a Cholesky factorization of B^T B, at half of QR's cost; None where columns may be dependent."""
    gram = gram_matrix(columns)
    lengths = gram.diagonal().sqrt()
    if not float(lengths.min()) > 0:
        return None
    r, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None], upper=True)
    return r * lengths if not failed and _spread(r) > FAR else None


def _spread(r: Tensor) -> float:
    diagonal = r.diagonal().abs()
    return float(diagonal.min() / diagonal.max())
