"""Where a rule that works entry by entry may work: core space, KnOTS's right space, whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.fuse.factors import Core, Factors
from workers.fuse.normal import Module
from workers.fuse.pieces import Products
from workers.fuse.rule import Apply, Merge, Options
from workers.fuse.shared import numerical_svd, seed_of, shared


def in_core(merge: Merge) -> Apply:
    """D = U f(M_1, ..., M_T) V^T with D_i = U M_i V^T (arXiv 2509.17786, equation 7). O((M+N)k^2 + k^3)."""

    def apply(module: Module, options: Options) -> Core:
        space = shared(module)
        weights = torch.tensor(module.weights, dtype=torch.float64)
        return space.back(merge(space.middles, weights, options, seed_of(options.seed, module.name)))

    apply.__doc__ = f"In core space: {merge.__doc__}"
    return apply


def in_knots(merge: Callable[[Products, Tensor, Options, int], Tensor]) -> Apply:
    """D = U S f(V_1, ..., V_T) with [D_1 | ... | D_T] = U S [V_1 | ... | V_T] (arXiv 2410.19735, section 3).

    Exact without a dense matrix: with D_i = U_i S_i W_i^T the concatenation is [U_i S_i] blockdiag(W_i^T), so
    U, S and V' are those of [U_i S_i], and V_i = V'_i W_i^T. Entries are those of k x N matrices.
    """

    def apply(module: Module, options: Options) -> Factors:
        weights = torch.tensor(module.weights, dtype=torch.float64)
        left, rights = knots_space(module)
        return Factors(merge(rights, weights, options, seed_of(options.seed, module.name)), left)

    apply.__doc__ = f"In KnOTS's right space (arXiv 2410.19735): {merge.__doc__}"
    return apply


def knots_space(module: Module) -> tuple[Tensor, Products]:
    """U S [M, k] and the V_i [k, N]. The largest entry of every column of U is positive."""
    parts = [numerical_svd(share) for share in module.shares]
    wide = torch.cat([part.u * part.s for part in parts], dim=1)
    u, s, vh = numerical_svd(Factors(torch.eye(wide.shape[1], dtype=wide.dtype), wide))
    blocks = vh.split([len(part.s) for part in parts], dim=1)
    return u * s, Products(tuple(blocks), tuple(part.vh for part in parts))


def on_dense(merge: Merge) -> Apply:
    """Entry by entry on the whole M x N deltas, one module at a time: slow, and what the papers define."""

    def apply(module: Module, options: Options) -> Factors:
        weights = torch.tensor(module.weights, dtype=torch.float64)
        deltas = torch.stack([share.b @ share.a for share in module.shares])
        merged = merge(deltas, weights, options, seed_of(options.seed, module.name))
        m, n = merged.shape
        eye = torch.eye(min(m, n), dtype=torch.float64)
        u, s, vh = numerical_svd(Factors(merged, eye) if m <= n else Factors(eye, merged))
        return Factors(s[:, None] * vh, u)

    apply.__doc__ = f"On whole matrices: {merge.__doc__}"
    return apply
