"""Model Breadcrumbs: neither the outliers nor the noise."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.largest import largest
from workers.fuse.rule import Options
from workers.fuse.ties import kept_entries


def breadcrumbs(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """sum_i w_i m_i * delta_i (arXiv 2312.06795, equations 1 and 2).

    m_i leaves out the largest gamma of the entries and the smallest, so that `density` of them are kept. At
    density 1 nothing is left out.
    """
    size = deltas[0].numel()
    keep = kept_entries(options.kept, size)
    gamma = 0.01 if options.gamma is None else options.gamma
    top = min(int(gamma * size), size - keep)
    mask = largest(deltas, top + keep) & ~largest(deltas, top)
    return torch.tensordot(weights, deltas * mask, dims=1)
