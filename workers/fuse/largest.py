"""Which entries of each adapter are its largest: by selection, for a whole order takes several times longer.

Legend: T adapters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.fuse.pieces import ROWS, Deltas


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
    magnitudes = deltas.abs().double().numpy().reshape(-1, deltas.shape[-1])
    found = np.empty(magnitudes.shape, np.int64)
    each = np.arange(magnitudes.shape[1])
    for start in range(0, len(magnitudes), ROWS):
        rows = slice(start, start + ROWS)
        for row, of_row in zip(found[rows], _ascending(magnitudes[rows]), strict=True):
            row[of_row] = each
    return torch.from_numpy(found).reshape(deltas.shape)


def _ascending(magnitudes: NDArray[np.float64]) -> NDArray[np.int64]:
    """[M, N]: where the smallest of each row is, the next one, and so on.

    The bits of numbers of one sign are in the order of the numbers. The lowest give way to the place, and
    are sorted with it: half the time of an argsort. Where those above are equal, that would decide.
    """
    places = np.arange(magnitudes.shape[1])
    low = (1 << (len(places) - 1).bit_length()) - 1
    keys = magnitudes.view(np.int64) & ~low | places
    keys.sort(axis=-1)
    if (keys[:, 1:] ^ keys[:, :-1] <= low).any():
        return np.argsort(magnitudes, axis=-1, kind="stable")
    return keys & low
