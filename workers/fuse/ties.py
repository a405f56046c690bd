"""TIES: trim, elect a sign, merge what agrees. Three readings, which differ where weights differ."""

from __future__ import annotations

from torch import Tensor

from workers.fuse.rule import Options


def ties(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """arXiv 2306.01708, algorithm 1, with w_i delta_i in the deltas' place.

    The sign of sum_i w_i delta_i is elected; the mean is over those not zero that agree.
    """
    weighted = _broadcast(weights, deltas) * trimmed(deltas, options.kept)
    return agreeing_mean(weighted)


def ties_peft(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """As PEFT's `ties`: the sign of sum_i delta_i, unweighted, is elected; the weighted ones that agree are
    divided by their count (arXiv 2306.01708)."""
    kept = trimmed(deltas, options.kept)
    agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return (_broadcast(weights, kept) * kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def ties_mergekit(deltas: Tensor, weights: Tensor, options: Options, seed: int) -> Tensor:  # noqa: ARG001
    """As mergekit's `ties` with normalize: the sign of sum_i w_i delta_i is elected; the weighted ones that
    agree are divided by the sum of their weights (arXiv 2306.01708)."""
    kept, each = trimmed(deltas, options.kept), _broadcast(weights, deltas)
    weighted = each * kept
    agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    share = (each * agrees).sum(0)
    return (weighted * agrees).sum(0) / share.where(share != 0, share.new_ones(()))


def agreeing_mean(weighted: Tensor) -> Tensor:
    """Mean over T of the entries that have the sign of their sum; 0 where the sum is 0."""
    agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trimmed(deltas: Tensor, density: float) -> Tensor:
    """[T, ...] with the largest `density` of each one's entries, by magnitude; the others 0."""
    size = deltas[0].numel()
    keep = round(density * size)
    if keep >= size:
        return deltas
    flat = deltas.abs().flatten(1)
    least = flat.kthvalue(size - keep, dim=1).values
    return deltas * (deltas.abs() > _broadcast(least, deltas))


def _broadcast(each: Tensor, like: Tensor) -> Tensor:
    return each.reshape(-1, *[1] * (like.ndim - 1))
