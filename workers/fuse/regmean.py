"""RegMean: least squares over the inputs that each adapter was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

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
    Raises BadInput where one is missing. O(N^3) a module; memory holds one of them beside their sum.
    """
    stacked = module.stacked()
    parts = stacked.a.split([share.a.shape[0] for share in module.shares])
    seen: list[Tensor] = []
    total: Tensor | None = None
    for index, (weight, part) in enumerate(zip(module.weights, parts, strict=True)):
        gram = _gram(module, index, 0.9 if options.alpha is None else options.alpha)
        seen.append(part @ gram)
        total = gram.mul_(weight) if total is None else total.add_(gram, alpha=weight)
        del gram
    assert total is not None, "a module has a share for each adapter"
    return Factors(torch.linalg.solve(total, torch.cat(seen), left=False), stacked.b)


def _gram(module: Module, index: int, alpha: float) -> Tensor:
    """alpha G + (1 - alpha) diag(G), with the ridge, in float64."""
    found = module.gram(index)
    if found is None:
        raise BadInput(
            f"rule 'regmean' needs the inputs of module '{module.name}' of adapter {index + 1}: train it "
            "with gram_rows in its recipe, or put its Gram matrix X^T X under that name into "
            "gram.safetensors beside the adapter"
        )
    gram = found.double()
    diagonal = gram.diagonal().clone()
    gram = gram * alpha if gram is found else gram.mul_(alpha)
    gram.diagonal().copy_(diagonal + RIDGE * diagonal.mean())
    return gram
