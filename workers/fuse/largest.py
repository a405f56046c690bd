"""Which entries of each adapter are its largest: by selection, for a whole order takes several times longer.

Legend: T adapters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.fuse.pieces import Deltas


def largest(deltas: Deltas, count: int) -> Tensor:
    """True [T, ...] for exactly `count` entries of each of deltas [T, ...]: its largest by magnitude.

    Of equal entries the first go before the others, so that a smaller count picks some of a greater one's.
    """
    masks = [_largest(delta.abs().reshape(-1).numpy(), count) for delta in deltas]
    return torch.from_numpy(np.stack(masks)).reshape(deltas.shape)


def _largest(magnitudes: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """By counting how many magnitudes begin with the same 16 bits: only those at the bound are compared."""
    size = magnitudes.size
    if count in (0, size):
        return np.full(size, count == size)
    leading = magnitudes.astype(np.float32).view(np.uint32) >> 16
    at_least = np.bincount(leading)[::-1].cumsum()[::-1]
    bound = np.flatnonzero(at_least >= count)[-1]
    mask = leading > bound
    at_bound = np.flatnonzero(leading == bound)
    mask[at_bound[_first_largest(magnitudes[at_bound], count - int(np.count_nonzero(mask)))]] = True
    return mask


def _first_largest(magnitudes: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Where the `count` largest are."""
    size = magnitudes.size
    least = np.partition(magnitudes, size - count)[size - count]
    equal = np.flatnonzero(magnitudes == least)
    above = np.flatnonzero(magnitudes > least)
    return np.concatenate([above, equal[: count - above.size]])


def places(deltas: Tensor) -> Tensor:
    """[..., N]: where each entry stands among its row's magnitudes, from 0; equal ones as they come."""
    magnitudes = deltas.abs().numpy().reshape(-1, deltas.shape[-1])
    order = np.argsort(magnitudes, axis=-1)
    sorted_ = np.take_along_axis(magnitudes, order, -1)
    if (sorted_[:, 1:] == sorted_[:, :-1]).any():
        order = np.argsort(magnitudes, axis=-1, kind="stable")  # takes three times as long
    found = np.empty_like(order)
    for row, of_row in zip(found, order, strict=True):
        row[of_row] = np.arange(len(row))
    return torch.from_numpy(found).reshape(deltas.shape)
