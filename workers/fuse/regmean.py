"""RegMean: least squares over the inputs that each adapter was trained on."""

from __future__ import annotations

import torch

from workers.fuse.factors import Factors
from workers.fuse.normal import Module
from workers.fuse.rule import Options
from workers.types import BadInput

RIDGE = 1e-6
"""Of the mean diagonal, to each Gram matrix alike: directions that no input has must not divide by 0."""


def regmean(module: Module, options: Options) -> Factors:
    """D = (sum_i w_i D_i G_i) (sum_i w_i G_i)^-1 (arXiv 2212.09849, equation 2), at the sum of the ranks.

    With D_i = B_i A_i: B = [B_i] and A_i' = w_i A_i G_i (sum_j w_j G_j)^-1. G_i = X_i^T X_i [N, N] are read
    from `gram.safetensors` beside each adapter; off the diagonal they are multiplied by alpha (section 4.2).
    Raises BadInput where one is missing. O(N^3) a module.
    """
    alpha = 0.9 if options.alpha is None else options.alpha
    grams = []
    for index, gram in enumerate(module.grams or (None,) * len(module.shares)):
        if gram is None:
            raise BadInput(
                f"rule 'regmean' needs the inputs of module '{module.name}' of adapter {index + 1}: "
                "put its Gram matrix X^T X under that name into gram.safetensors beside the adapter"
            )
        gram = gram.double()
        diagonal = gram.diagonal()
        grams.append(alpha * gram + torch.diag((1 - alpha) * diagonal + RIDGE * diagonal.mean()))
    total = sum((w * gram for w, gram in zip(module.weights, grams, strict=True)), torch.zeros_like(grams[0]))
    stacked = module.stacked()
    parts = stacked.a.split([share.a.shape[0] for share in module.shares])
    seen = torch.cat([part @ gram for part, gram in zip(parts, grams, strict=True)])
    return Factors(torch.linalg.solve(total, seen, left=False), stacked.b)
