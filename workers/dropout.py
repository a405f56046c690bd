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
        mask_STD[row, : key.tokens] = _draw(key, p, layer, x_STD.shape[2], dtype)
    return mask_STD.to(x_STD.device)


def draw_mask_end_to_end(
    keys: Sequence[DropoutKey], p: float, layer: int, x_ND: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same multipliers [N, D] of rows without padding."""
    return torch.cat([_draw(key, p, layer, x_ND.shape[1], dtype) for key in keys]).to(x_ND.device)


def _draw(key: DropoutKey, p: float, layer: int, features: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(key.seed, key.step, key.sample, layer))
    return (torch.rand(key.tokens, features, generator=generator) >= p).to(dtype) / (1 - p)


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on the key alone, on every machine and Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
