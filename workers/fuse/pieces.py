"""Stacks of deltas [T, R, N] worked on entry by entry, in pieces that stay in the processor's cache.

Whole stacks would be written to main memory and read from it by every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

ROWS, COLUMNS = 64, 256
"""Of a piece: 1 MiB for eight adapters. Smaller ones would have two threads wait for Python's lock."""


@dataclass(frozen=True)
class Products:
    """Deltas that are products `lefts[i] @ rights[i]`: made when they are asked for, as many as are."""

    lefts: tuple[Tensor, ...]
    rights: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.lefts), self.lefts[0].shape[0], self.rights[0].shape[1]))

    def __iter__(self) -> Iterator[Tensor]:
        return (left @ right for left, right in zip(self.lefts, self.rights, strict=True))

    def piece(self, rows: slice, columns: slice) -> Tensor:
        pairs = zip(self.lefts, self.rights, strict=True)
        return torch.stack([left[rows] @ right[:, columns] for left, right in pairs])


Deltas: TypeAlias = Tensor | Products
"""[T, R, N], or a tensor [T, ...]."""


def in_pieces(
    merge: Callable[[Tensor, Tensor], Tensor], weights: Tensor, deltas: Deltas, keep: Tensor | None = None
) -> Tensor:
    """`merge(deltas, weights)` with weights [T, 1, 1]; deltas count as 0 where `keep` [T, ...] is false."""
    shape, each = deltas.shape, weights[:, None, None]
    if isinstance(deltas, Tensor):
        deltas = deltas.reshape(shape[0], -1, shape[-1])
    mask = None if keep is None else keep.reshape(deltas.shape)
    merged = weights.new_empty(deltas.shape[1:])
    for rows, columns in _grid(*merged.shape):
        part = deltas[:, rows, columns] if isinstance(deltas, Tensor) else deltas.piece(rows, columns)
        if mask is not None:
            part = part * mask[:, rows, columns]
        merged[rows, columns] = merge(part, each)
    return merged.reshape(shape[1:])


def _grid(rows: int, columns: int) -> Generator[tuple[slice, slice]]:
    for row, column in product(range(0, rows, ROWS), range(0, columns, COLUMNS)):
        yield slice(row, row + ROWS), slice(column, column + COLUMNS)
