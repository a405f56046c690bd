"""Which entries of each adapter are its largest: by selection, for a whole order takes several times longer.

Legend: T adapters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def largest(deltas: Tensor, count: int) -> Tensor:
    """True [T, ...] for exactly `count` entries of each of deltas [T, ...]: its largest by magnitude.

    Of equal entries the first go before the others, so that a smaller count picks some of a greater one's.
    """
    masks = [_largest(delta.abs().reshape(-1).numpy(), count) for delta in deltas]
    return torch.from_numpy(np.stack(masks)).reshape(deltas.shape)


def _largest(magnitudes: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    size = magnitudes.size
    if count in (0, size):
        return np.full(size, count == size)
    least = np.partition(magnitudes, size - count)[size - count]
    mask = magnitudes >= least
    if surplus := int(mask.sum()) - count:
        mask[np.flatnonzero(magnitudes == least)[-surplus:]] = False
    return mask


def places(deltas: Tensor) -> Tensor:
    """[..., N]: where each entry stands among its row's magnitudes, from 0; equal ones as they come."""
    order = np.argsort(deltas.abs().numpy(), axis=-1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)
    return torch.from_numpy(found)
