"""DELLA: as DARE, with a chance that falls with an entry's magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.dare import dropped
from workers.fuse.rule import Options
from workers.fuse.ties import agreeing_mean


def della(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """MagPrune, then signs elected and agreeing entries averaged (arXiv 2406.11617, section 3)."""
    kept = magpruned(deltas, options, seed)
    return agreeing_mean(weights.reshape(-1, *[1] * (kept.ndim - 1)) * kept)


def della_linear(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """MagPrune (arXiv 2406.11617, equations 1 to 3), then the weighted sum, without an election."""
    return torch.tensordot(weights, magpruned(deltas, options, seed), dims=1)


def magpruned(deltas: Tensor, options: Options, seed: int) -> Tensor:
    """Entry j of a row of n is kept with chance p - e/2 + e rank_j / (n - 1), rank 0 the smallest.

    e is epsilon, taken no larger than keeps every chance above 0 and at most 1.
    """
    density = options.kept
    most = 0.1 if options.epsilon is None else options.epsilon
    epsilon = min(most, 2 * (1 - density), 1.98 * density)
    ranks = deltas.abs().argsort(dim=-1).argsort(dim=-1).double() / max(1, deltas.shape[-1] - 1)
    return dropped(deltas, density - epsilon / 2 + epsilon * ranks, seed)
