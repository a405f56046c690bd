"""One module in the coordinates of its adapters' joint spaces: small, and the same to a rule that rotates.

Legend: M out_features, N in_features, K sum of the adapters' ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from workers.fuse.basis import Map, side
from workers.fuse.factors import Factors
from workers.fuse.normal import Module
from workers.fuse.rule import Turns


@dataclass(frozen=True)
class Reduced:
    """Of `whole` with D_i = Q_b R_b,i R_a,i^T Q_a^T: `module` has the shares R_b,i R_a,i^T."""

    whole: Module
    module: Module
    left: Map
    right: Map

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
    low_b, left = side(torch.cat([share.b for share in module.shares], dim=1))
    low_a, right = side(torch.cat([share.a for share in module.shares]).T)
    shares = zip(low_a.T.split(ranks), low_b.split(ranks, dim=1), strict=True)
    low = replace(module, shares=tuple(Factors(a, b) for a, b in shares))
    return Reduced(module, low, left, right)
