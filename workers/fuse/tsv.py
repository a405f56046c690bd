"""Task singular vectors."""

from __future__ import annotations

import torch

from workers.fuse.factors import Factors
from workers.fuse.normal import Module
from workers.fuse.rule import Options
from workers.fuse.shared import nearest_orthogonal, numerical_svd


def tsv(module: Module, options: Options) -> Factors:  # noqa: ARG001 - every rule has this signature
    """TSV-Merge (arXiv 2412.00081, algorithm 1): D = U' S V'^T with D_i = U_i S_i V_i^T.

    U' and V' are the nearest orthogonal matrices to [U_i] and [V_i], which whitens away what adapters share;
    S holds w_i S_i. All r_i triplets are kept: the paper's min(M, N) / T is for full matrices.
    """
    parts = [numerical_svd(share) for share in module.shares]
    s = torch.cat([weight * part.s for weight, part in zip(module.weights, parts, strict=True)])
    # An adapter that is left out must not bend the others' directions.
    used = s != 0
    u = nearest_orthogonal(torch.cat([part.u for part in parts], dim=1)[:, used])
    v = nearest_orthogonal(torch.cat([part.vh for part in parts]).T[:, used])
    return Factors(s[used, None] * v.T, u)
