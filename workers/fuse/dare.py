"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.pieces import Deltas, in_pieces
from workers.fuse.rule import Options
from workers.fuse.ties import agreeing_mean, agreeing_peft, agreeing_sum


def dare(deltas: Deltas, weights: Tensor, options: Options, seed: int) -> Tensor:
    """sum_i w_i m_i * delta_i / p, m_i ~ Bernoulli(p) for density p (arXiv 2311.03099, equations 2, 3)."""
    return in_pieces(_sum, weights, deltas, drawn(deltas, options.kept, seed)) / options.kept


def _sum(deltas: Tensor, weights: Tensor) -> Tensor:
    return (weights * deltas).sum(0)


def dare_ties(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """DARE (arXiv 2311.03099), then signs elected and agreeing entries averaged as in rule `ties`."""
    return agreeing_mean(dropped(deltas, options.kept, seed), weights)


def dare_ties_peft(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """arXiv 2311.03099 as PEFT's `dare_ties` has it: signs are elected unweighted, divided by count."""
    return agreeing_peft(dropped(deltas, options.kept, seed), weights)


def dare_ties_mergekit(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """arXiv 2311.03099 as mergekit's `dare_ties` has it: what agrees is added, and divided by nothing."""
    return agreeing_sum(dropped(deltas, options.kept, seed), weights)


def dropped(deltas: Tensor, chance: Tensor | float, seed: int) -> Tensor:
    """Each entry is kept with its chance, and divided by it, so that its expectation stays."""
    return deltas * drawn(deltas, chance, seed) / chance


def drawn(deltas: Deltas, chance: Tensor | float, seed: int) -> Tensor:
    """True where an entry is kept. The same seed draws the same numbers for every chance."""
    generator = torch.Generator().manual_seed(seed)
    count, *shape = deltas.shape
    chances = [chance] * count if isinstance(chance, float) else chance
    return torch.stack(
        [torch.rand(shape, generator=generator, dtype=torch.float32) < each for each in chances]
    )
