"""TIES: trim, elect a sign, merge what agrees. Three readings, which differ where weights differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.fuse.largest import largest
from workers.fuse.pieces import Deltas, in_pieces
from workers.fuse.rule import Options


def ties(deltas: Deltas, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708, algorithm 1, with w_i delta_i in the deltas' place.

    The sign of sum_i w_i delta_i is elected; the mean is over those not zero that agree.
    """
    return in_pieces(_mean, weights, deltas, _kept(deltas, options.kept))


def ties_peft(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708 as PEFT's `ties` has it: signs are elected unweighted, see `agreeing_peft`."""
    return in_pieces(_peft, weights, deltas, _kept(deltas, options.kept))


def ties_mergekit(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708 as mergekit's `ties` has it: divided by weights, see `agreeing_share`."""
    return in_pieces(_share, weights, deltas, _kept(deltas, options.kept))


# ---- what agrees, of deltas [T, ...] ------------------------------------------------------------------


def agreeing_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Mean over T of the w_i delta_i that have the sign of their sum; 0 where the sum is 0."""
    return in_pieces(_mean, weights, deltas)


def agreeing_peft(deltas: Tensor, weights: Tensor) -> Tensor:
    """Sum of the w_i delta_i where delta_i has the sign of sum_i delta_i (0 counts as +), by their count."""
    return in_pieces(_peft, weights, deltas)


def agreeing_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """Sum of the w_i delta_i that have the sign of their sum (0 counts as +): mergekit, normalize: false."""
    return in_pieces(_sum, weights, deltas)


def agreeing_share(deltas: Tensor, weights: Tensor) -> Tensor:
    """`agreeing_sum` divided by the weights of those that agree: mergekit, normalize: true."""
    return in_pieces(_share, weights, deltas)


def _mean(deltas: Tensor, weights: Tensor) -> Tensor:
    weighted = weights * deltas
    agrees = (weighted * weighted.sum(0).sign() > 0).to(deltas.dtype)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_(min=1)


def _peft(deltas: Tensor, weights: Tensor) -> Tensor:
    agrees = (deltas.sign() == _majority(deltas)).to(deltas.dtype)
    return (weights * deltas * agrees).sum(0) / agrees.sum(0).clamp_(min=1)


def _sum(deltas: Tensor, weights: Tensor) -> Tensor:
    weighted = weights * deltas
    return (weighted * (weighted.sign() == _majority(weighted))).sum(0)


def _share(deltas: Tensor, weights: Tensor) -> Tensor:
    weighted = weights * deltas
    agrees = (weighted.sign() == _majority(weighted)).to(deltas.dtype)
    share = (weights * agrees).sum(0)
    return (weighted * agrees).sum(0) / share.where(share != 0, share.new_ones(()))


def _majority(deltas: Tensor) -> Tensor:
    total = deltas.sum(0)
    return torch.where(total >= 0, 1.0, -1.0).to(deltas.dtype)


# ---- trimming -----------------------------------------------------------------------------------------


def trimmed(deltas: Tensor, density: float) -> Tensor:
    """[T, ...] with the int(density * size) largest entries of each by magnitude, at least one; others 0."""
    return deltas * _kept(deltas, density)


def _kept(deltas: Deltas, density: float) -> Tensor:
    """True where `trimmed` keeps an entry."""
    return largest(deltas, kept_entries(density, math.prod(deltas.shape[1:])))


def kept_entries(density: float, size: int) -> int:
    """Rounded down as PEFT and mergekit do, but never to nothing."""
    return min(size, max(1, int(density * size)))
