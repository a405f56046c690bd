"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.rule import Options
from workers.fuse.ties import agreeing_mean


def dare(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """sum_i w_i m_i * delta_i / p, m_i ~ Bernoulli(p) for density p (arXiv 2311.03099, equations 2, 3)."""
    return torch.tensordot(weights, dropped(deltas, options.kept, seed), dims=1)


def dare_ties(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """DARE (arXiv 2311.03099), then signs elected and agreeing entries averaged as in rule `ties`."""
    kept = dropped(deltas, options.kept, seed)
    return agreeing_mean(weights.reshape(-1, *[1] * (kept.ndim - 1)) * kept)


def dropped(deltas: Tensor, chance: Tensor | float, seed: int) -> Tensor:
    """Each entry is kept with its chance, and divided by it, so that its expectation stays."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(deltas.shape, generator=generator, dtype=torch.float32)
    return deltas * (drawn < chance) / chance
