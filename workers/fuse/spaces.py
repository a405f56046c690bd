"""Where a rule that works entry by entry may work: core space, KnOTS's right space, whole matrices."""

from __future__ import annotations

import torch

from workers.fuse.factors import Factors, svd
from workers.fuse.normal import Module
from workers.fuse.rule import Apply, Merge, Options
from workers.fuse.shared import NULL, balanced, numerical, seed_of, shared


def in_core(merge: Merge) -> Apply:
    """D = U f(M_1, ..., M_T) V^T with D_i = U M_i V^T (arXiv 2509.17786, equation 7). O((M+N)k^2 + k^3)."""

    def apply(module: Module, options: Options) -> Factors:
        space = shared(module)
        weights = torch.tensor(module.weights, dtype=torch.float64)
        return space.back(merge(space.middles, weights, options, seed_of(options.seed, module.name)))

    apply.__doc__ = f"In core space: {merge.__doc__}"
    return apply


def in_knots(merge: Merge) -> Apply:
    """D = U S f(V_1, ..., V_T) with [D_1 | ... | D_T] = U S [V_1 | ... | V_T] (arXiv 2410.19735, section 3).

    Exact without a dense matrix: with B = [B_1, ..., B_T] and A_i = L_i Q_i the concatenation is
    B blockdiag(A_i), so S and U are those of R_b blockdiag(L_i). Entries are those of k x N matrices.
    """

    def apply(module: Module, options: Options) -> Factors:
        weights = torch.tensor(module.weights, dtype=torch.float64)
        left, rights = knots_space(module)
        return Factors(merge(rights, weights, options, seed_of(options.seed, module.name)), left)

    apply.__doc__ = f"In KnOTS's right space (arXiv 2410.19735): {merge.__doc__}"
    return apply


def knots_space(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """U S [M, k] and the V_i stacked [T, k, N]. The largest entry of every column of U is positive."""
    shares = [balanced(share) for share in module.shares]
    lows, rows = zip(*(torch.linalg.qr(share.a.T, mode="reduced") for share in shares), strict=True)
    # b_i L_i with A_i = L_i Q_i, where torch gives A_i^T = Q R and so L = R^T.
    wide = torch.cat([share.b @ r.T for share, r in zip(shares, rows, strict=True)], dim=1)
    q, r = torch.linalg.qr(wide)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    rank = int((s > NULL * s[0]).sum()) if len(s) else 0
    u, vh = q @ u[:, :rank], vh[:rank]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign() if rank else u.new_ones(1, 0)
    blocks = (sign.T * vh).split([share.a.shape[0] for share in shares], dim=1)
    return u * sign * s[:rank], torch.stack([b @ low.T for b, low in zip(blocks, lows, strict=True)])


def on_dense(merge: Merge) -> Apply:
    """Entry by entry on the whole M x N deltas, one module at a time: slow, and what the papers define."""

    def apply(module: Module, options: Options) -> Factors:
        weights = torch.tensor(module.weights, dtype=torch.float64)
        deltas = torch.stack([share.b @ share.a for share in module.shares])
        merged = merge(deltas, weights, options, seed_of(options.seed, module.name))
        m, n = merged.shape
        eye = torch.eye(min(m, n), dtype=torch.float64)
        u, s, vh = numerical(svd(Factors(merged, eye) if m <= n else Factors(eye, merged)))
        return Factors(s[:, None] * vh, u)

    apply.__doc__ = f"On whole matrices: {merge.__doc__}"
    return apply
