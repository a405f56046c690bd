"""TIES: trim, elect a sign, merge what agrees. Three readings, which differ where weights differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workers.fuse.largest import largest
from workers.fuse.rule import Options

CACHED = 1 << 15
"""Numbers of a piece, 256 KiB: a few such are in use at once."""


def ties(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708, algorithm 1, with w_i delta_i in the deltas' place.

    The sign of sum_i w_i delta_i is elected; the mean is over those not zero that agree.
    """
    return _by_rows(_mean, weights, deltas, _kept(deltas, options.kept))


def ties_peft(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708 as PEFT's `ties` has it: signs are elected unweighted, see `agreeing_peft`."""
    return _by_rows(_peft, weights, deltas, _kept(deltas, options.kept))


def ties_mergekit(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708 as mergekit's `ties` has it: divided by weights, see `agreeing_share`."""
    return _by_rows(_share, weights, deltas, _kept(deltas, options.kept))


# ---- what agrees, of deltas [T, ...] ------------------------------------------------------------------


def agreeing_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Mean over T of the w_i delta_i that have the sign of their sum; 0 where the sum is 0."""
    return _by_rows(_mean, weights, deltas)


def agreeing_peft(deltas: Tensor, weights: Tensor) -> Tensor:
    """Sum of the w_i delta_i where delta_i has the sign of sum_i delta_i (0 counts as +), by their count."""
    return _by_rows(_peft, weights, deltas)


def agreeing_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """Sum of the w_i delta_i that have the sign of their sum (0 counts as +): mergekit, normalize: false."""
    return _by_rows(_sum, weights, deltas)


def agreeing_share(deltas: Tensor, weights: Tensor) -> Tensor:
    """`agreeing_sum` divided by the weights of those that agree: mergekit, normalize: true."""
    return _by_rows(_share, weights, deltas)


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


def _by_rows(merge: Callable[[Tensor, Tensor], Tensor], weights: Tensor, *stacks: Tensor) -> Tensor:
    """`merge` of the product of the stacks [T, R, ...], in pieces of R that stay in the processor's cache.

    Whole stacks would be read and written from main memory by every operation.
    """
    first = stacks[0]
    rows = max(1, CACHED * first.shape[1] // max(1, first.numel()))
    each = weights.reshape(-1, *[1] * (first.ndim - 1))
    pieces = zip(*(stack.split(rows, dim=1) for stack in stacks), strict=True)
    return torch.cat([merge(math.prod(piece[1:], start=piece[0]), each) for piece in pieces])


# ---- trimming -----------------------------------------------------------------------------------------


def trimmed(deltas: Tensor, density: float) -> Tensor:
    """[T, ...] with the int(density * size) largest entries of each by magnitude, at least one; others 0."""
    return deltas * _kept(deltas, density)


def _kept(deltas: Tensor, density: float) -> Tensor:
    """True where `trimmed` keeps an entry."""
    return largest(deltas, kept_entries(density, deltas[0].numel()))


def kept_entries(density: float, size: int) -> int:
    """Rounded down as PEFT and mergekit do, but never to nothing."""
    return min(size, max(1, int(density * size)))
