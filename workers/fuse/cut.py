"""The best approximation of a rule's result at a rank, at an energy, or in a vLLM bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.factors import Core, Factors, svd
from workers.fuse.rule import Fused, Options


def cut(whole: Factors | Core, options: Options) -> Fused:
    """The largest singular triplets of B A, as A = S^1/2 V^T and B = U S^1/2; `whole` itself if nothing cuts.

    No matrix of that rank is nearer in the Frobenius or the spectral norm (Eckart and Young, Psychometrika 1,
    1936; Mirsky 1960), so both errors are exact.
    """
    if options.rank is None and options.bucket is None and options.energy is None:
        return Fused(whole.factors() if isinstance(whole, Core) else whole, discarded_energy=0.0)
    u, s, vh = svd(whole, lambda s: _rank(s, options))
    rank = len(vh)
    root = s[:rank].sqrt()
    kept = Factors(root[:, None] * vh, u * root)
    total, lost = float(torch.linalg.vector_norm(s)), float(torch.linalg.vector_norm(s[rank:]))
    worst = float(s[rank]) if rank < len(s) else 0.0
    return Fused(kept, lost / total if total else 0.0, lost, worst, s[:rank])


def _rank(s: Tensor, options: Options) -> int:
    if options.energy is None:
        return min(options.rank or options.bucket or 0, len(s))
    lost = s.square().flip(0).cumsum(0).flip(0)
    # lost[r] is what rank r leaves out; the last singular value may be all rounding, so compare with <=.
    enough = (lost <= (1 - options.energy) * lost[0]).nonzero() if len(s) else s.new_zeros(0)
    return max(1, int(enough[0])) if len(enough) else len(s)
