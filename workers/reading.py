"""Forward passes without gradients that the rows of several adapters share, as training shares its ticks.

A *chunk* is cut from one candidate's rows by these alone, and padded to a length of its own; chunks of one
kind then go into one pass. So what is read of a row depends neither on who else is read nor on the number of
ranks: only which pass a chunk is in does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from workers.lora import Adapters, Segment
from workers.ranks import Ranks
from workers.rows import longest_row

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Reader:
    """The model that is read, on this rank, and its peers."""

    model: Any
    ranks: Ranks
    device: torch.device
    pad_id: int
    adapters: Adapters | None = None
    """Where the candidates' slots are; None: the caller has set what all rows see."""

    @property
    def longest(self) -> int:
        """Most tokens a row may have."""
        return longest_row(self.model.config)

    @contextmanager
    def seeing(self, chunks: Sequence[Chunk]) -> Generator[None]:
        """Within the block each chunk's rows, one chunk after the other, see their own adapter."""
        if self.adapters is None:
            yield
            return
        segments: list[Segment] = []
        first = 0
        for chunk in chunks:
            if chunk.slot is not None:
                segments.append(Segment(chunk.slot, first, first + len(chunk.items)))
            first += len(chunk.items)
        with self.adapters.rows(segments):
            yield


@dataclass(frozen=True)
class Chunk:
    """Some rows of one candidate."""

    candidate: int
    slot: int | None
    """Of the candidate's adapter; None for the base alone."""
    items: tuple[int, ...]
    """Which of the candidate's rows."""
    kind: tuple[Any, ...]
    """Chunks of one kind may share a pass; its first entry is their padded length."""
    share: float
    """Of what a pass holds; above 1 for a row too large for it."""


def read_all(
    reader: Reader,
    chunks: Sequence[Chunk],
    read: Callable[[tuple[Chunk, ...]], Mapping[Key, Found]],
) -> dict[Key, Found]:
    """What `read` finds in each pass, together, on every rank. Collective."""
    ranks, passes = reader.ranks, share_passes(chunks, reader.ranks.world_size)
    found: dict[Key, Found] = {}
    for number in range(0, len(passes), ranks.world_size):
        # A rank without a pass of its own repeats the last one: a partitioned base needs every rank.
        mine = passes[min(number + ranks.rank, len(passes) - 1)]
        with reader.seeing(mine):
            found |= read(mine)
    merged: dict[Key, Found] = {}
    for part in ranks.gather(found):
        merged |= part
    return merged


def share_passes(chunks: Sequence[Chunk], world_size: int) -> list[tuple[Chunk, ...]]:
    """Every chunk once, the longest rows first, candidates in order within a pass."""
    by_kind: dict[tuple[Any, ...], list[Chunk]] = {}
    for chunk in sorted(chunks, key=lambda chunk: -chunk.kind[0]):
        by_kind.setdefault(chunk.kind, []).append(chunk)
    return [one for alike in by_kind.values() for one in _packed(alike, world_size)]


def _packed(chunks: Sequence[Chunk], world_size: int) -> list[tuple[Chunk, ...]]:
    """As few passes as hold them, but one a rank if there are chunks enough: no rank waits for another."""
    full = [(chunk,) for chunk in chunks if chunk.share >= 1]
    small = [chunk for chunk in chunks if chunk.share < 1]
    least = -(-math.ceil(sum(chunk.share for chunk in small)) // world_size) * world_size
    for count in range(min(least, len(small)), len(small)):
        passes = _dealt(small, count)
        if all(sum(chunk.share for chunk in one) <= 1 for one in passes):
            return [*full, *passes]
    return [*full, *((chunk,) for chunk in small)]


def _dealt(chunks: Sequence[Chunk], count: int) -> list[tuple[Chunk, ...]]:
    """The largest first, each to the pass that has least so far."""
    passes: list[list[Chunk]] = [[] for _ in range(count)]
    for chunk in sorted(chunks, key=lambda chunk: -chunk.share):
        min(passes, key=lambda one: sum(other.share for other in one)).append(chunk)
    return [tuple(sorted(one, key=lambda chunk: (chunk.candidate, chunk.items))) for one in passes]
