"""DELLA: as DARE, with a chance that falls with an entry's magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.fuse.dare import drawn, dropped
from workers.fuse.largest import places
from workers.fuse.rule import Options
from workers.fuse.ties import agreeing_mean, agreeing_share


def della(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """MagPrune, then signs elected and agreeing entries averaged (arXiv 2406.11617, section 3)."""
    return agreeing_mean(_magpruned(deltas, options, seed), weights)


def della_linear(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """MagPrune (arXiv 2406.11617, equations 1 to 3), then the weighted sum, without an election."""
    return torch.tensordot(weights, _magpruned(deltas, options, seed), dims=1)


def della_mergekit(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:
    """arXiv 2406.11617 as mergekit's `della` has it.

    Chances spread to epsilon on both sides, what is left is scaled to the l1 norm from before, and what
    agrees is divided by its weights.
    """
    kept = deltas * drawn(deltas, chances(deltas, options.kept, 2 * _epsilon(options)), seed)
    before, after = (part.abs().flatten(1).sum(1) for part in (deltas, kept))
    scale = torch.where(after > 0, before / after, 1.0)
    return agreeing_share(kept * scale[:, None, None], weights)


def chances(deltas: Tensor, density: float, spread: float) -> Tensor:
    """Entry j of a row of n is kept with chance p - e/2 + e rank_j / (n - 1), rank 0 the smallest.

    e is `spread`, taken no larger than keeps every chance above 0 and at most 1.
    """
    spread = min(spread, 2 * (1 - density), 1.98 * density)
    step = spread / max(1, deltas.shape[-1] - 1)
    return places(deltas).double().mul_(step).add_(density - spread / 2)


def _magpruned(deltas: Tensor, options: Options, seed: int) -> Tensor:
    return dropped(deltas, chances(deltas, options.kept, _epsilon(options)), seed)


def _epsilon(options: Options) -> float:
    return 0.1 if options.epsilon is None else options.epsilon
