"""The best approximation of the weighted sum at a chosen rank."""

from __future__ import annotations

import torch

from workers.fuse.factors import Factors, svd
from workers.fuse.normal import Module
from workers.fuse.rule import Fused, Options


def truncated_svd(module: Module, options: Options) -> Fused:
    """The `options.rank` largest singular triplets of sum_i w_i D_i, as A = S^1/2 V^T and B = U S^1/2.

    No matrix of that rank is nearer in the Frobenius norm (Eckart and Young, Psychometrika 1, 1936). What it
    leaves out, relative to the whole, is the discarded energy sqrt(sum_{i>R} s_i^2 / sum_i s_i^2).
    """
    assert options.rank is not None, "the table says that svd needs a rank"
    u, s, vh = svd(module.stacked())
    rank = min(options.rank, module.full_rank)
    root = s[:rank].sqrt()
    kept = Factors(root[:, None] * vh[:rank], u[:, :rank] * root)
    total = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[rank:]))
    return Fused(kept, discarded_energy=lost / total if total else 0.0)
