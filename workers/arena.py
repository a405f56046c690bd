"""Where adapters lie in memory: as rows of equal length, evenly spaced, so that neighbours are one tensor.

A row's place in its arena is the same distance from the next row's for every factor. So the A, or B, of jobs
whose rows follow one another are a strided view [J, ...], and a batched product reads them without a copy.

On a CPU an arena is memory that the kernel fills page by page when it is written: rows that nobody has cost
nothing, and a row that is given back is given back to the system.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

ROWS = 64
"""Of an arena; there are as many arenas as it takes."""
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on: rows that nobody has are not counted."""


@dataclass(frozen=True)
class Place:
    """Zeros [n] that are their owner's until they are given back."""

    values: Tensor
    arena: Arena | None = None
    row: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Neighbours in memory follow one another in it."""
        return (self.arena.number if self.arena else 0, self.row)

    def give_back(self) -> None:
        if self.arena:
            self.arena.give_back(self.row)


class Arena:
    """Rows of `length` numbers."""

    def __init__(self, number: int, length: int, dtype: torch.dtype) -> None:
        self.number = number
        size = torch.finfo(dtype).bits // 8
        self._stride = -(-length * size // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        self._memory = mmap.mmap(-1, ROWS * self._stride, flags=flags)
        rows = torch.frombuffer(self._memory, dtype=dtype).view(ROWS, self._stride // size)
        self._rows = rows[:, :length]
        self._free = list(range(ROWS))

    @property
    def bytes(self) -> int:
        """Of the rows that somebody has."""
        return (ROWS - len(self._free)) * self._stride

    @property
    def address(self) -> int:
        return self._rows.data_ptr()

    @property
    def full(self) -> bool:
        return not self._free

    def take(self) -> Place:
        """The first row that is free."""
        self._free.sort()
        row = self._free.pop(0)
        return Place(self._rows[row], self, row)

    def give_back(self, row: int) -> None:
        self._memory.madvise(mmap.MADV_DONTNEED, row * self._stride, self._stride)
        self._free.append(row)


class Arenas:
    """All arenas of one device, by what their rows are for and how long they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arenas: dict[tuple[str, int, torch.dtype], list[Arena]] = {}

    def take(self, what: str, length: int, dtype: torch.dtype) -> Place:
        """A row; on a GPU, where memory that nobody uses is not free, a tensor of its own."""
        if self._device.type != "cpu":
            return Place(torch.zeros(length, dtype=dtype, device=self._device))
        arenas = self._arenas.setdefault((what, length, dtype), [])
        found = next((arena for arena in arenas if not arena.full), None)
        if found is None:
            found = Arena(len(arenas), length, dtype)
            arenas.append(found)
        return found.take()

    @property
    def bytes(self) -> int:
        """Of all rows that somebody has, on a CPU."""
        return sum(arena.bytes for arenas in self._arenas.values() for arena in arenas)

    @property
    def addresses(self) -> set[int]:
        """Where the arenas begin."""
        return {arena.address for arenas in self._arenas.values() for arena in arenas}


class Neighbours:
    """The same factor of J adapters, or its gradients, one after the other."""

    def __init__(self, each: Sequence[Tensor]) -> None:
        self.each = list(each)
        self.all = _evenly_spaced(each)
        """[J, ...], a view; None if they do not lie evenly spaced in one arena, or differ in shape."""

    def read(self) -> Tensor:
        """[J, ...]; a copy if it has to be."""
        return torch.stack(self.each) if self.all is None else self.all

    def add(self, x_J: Tensor) -> None:
        """Add `x_J` [J, ...] to them."""
        if self.all is None:
            torch._foreach_add_(self.each, x_J.unbind())
        else:
            self.all.add_(x_J)


def _evenly_spaced(each: Sequence[Tensor]) -> Tensor | None:
    first, offsets = each[0], [tensor.storage_offset() for tensor in each]
    if len(each) == 1:
        return first.unsqueeze(0)
    gap, storage = offsets[1] - offsets[0], first.untyped_storage().data_ptr()
    even = gap > 0 and all(later - earlier == gap for earlier, later in pairwise(offsets))
    alike = all(
        (t.shape, t.stride(), t.untyped_storage().data_ptr()) == (first.shape, first.stride(), storage)
        for t in each
    )
    if not even or not alike:
        return None
    return first.as_strided((len(each), *first.shape), (gap, *first.stride()), offsets[0])
