"""LoRA dropout drawn from (job seed, step, sample, layer) alone: the same mask wherever a row lies.

Shapes: S rows of T tokens, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DropoutKey:
    """What a row's masks depend on: nothing but the job's seed, its step, and the sample."""

    seed: int
    step: int
    sample: int
    tokens: int
    """Real tokens of the row; padding is never dropped, so masks do not depend on it."""


def draw_mask(keys: Sequence[DropoutKey], p: float, layer: int, x_STD: Tensor, dtype: torch.dtype) -> Tensor:
    """The multiplier [S, T, D] of these rows: 0 where dropped, 1/(1-p) where kept, 1 on padding."""
    mask_STD = torch.ones(x_STD.shape, dtype=dtype)
    for row, key in enumerate(keys):
        generator = torch.Generator().manual_seed(seed_of(key.seed, key.step, key.sample, layer))
        drawn = torch.rand(key.tokens, x_STD.shape[2], generator=generator)
        mask_STD[row, : key.tokens] = (drawn >= p).to(dtype) / (1 - p)
    return mask_STD.to(x_STD.device)


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on the key alone, on every machine and Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
