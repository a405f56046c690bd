"""What goes into a tick: which rows of which jobs, in which micro-batches, on which ranks. Pure.

A job's step is cut into *chunks* by the job alone: its rows grouped by padded length, groups that are not
worth a pass of their own joined to the next longer one, and dealt to the ranks. A chunk is an atom: it is one
segment of one micro-batch on each rank, padded to its own length, and a job's chunks run in their own order.
So a job's gradient is the same sum in the same order whoever its neighbours are; composition decides only
when a chunk runs and beside whom.

Every rank computes the same composition, hence the same number of micro-batches of the same shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.rows import Row

PASS_TOKENS = 256
"""A pass of its own gathers the base twice; that costs about as much as so many padded tokens in another."""
SHORTEST = 16
"""Padded lengths start here: a float32 product with fewer rows may differ in its last bit."""


@dataclass(frozen=True)
class Chunk:
    """Rows of one job's step that share a padded length T; `rows[rank]` may be empty on some ranks."""

    padded_length: int
    rows: tuple[tuple[Row, ...], ...]

    @property
    def tokens(self) -> int:
        """Padded tokens of the fullest rank."""
        return self.padded_length * max(len(rows) for rows in self.rows)


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass: at most one chunk a job, all of one padded length."""

    padded_length: int
    chunks: tuple[tuple[str, Chunk], ...]
    """(job, chunk), in order of residence."""


def padded_length(tokens: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, then steps of an eighth of the next power of two."""
    step = max(SHORTEST, (1 << max(tokens - 1, 1).bit_length()) // 8)
    return -(-tokens // step) * step


def cut_step(rows: Sequence[Row], world_size: int, tokens_per_rank: int, longest: int) -> list[Chunk]:
    """One step's rows as chunks, longest first, rows in batch order within each.

    Depends on the job's own rows and the host's shape only. No chunk exceeds `tokens_per_rank` padded tokens
    on a rank, unless a single row does; no row is padded past `longest`, the base's last position.
    """
    lengths = [max(len(row.input_ids), min(padded_length(len(row.input_ids)), longest)) for row in rows]
    padded_to = _merged_lengths(Counter(lengths), world_size)
    by_length: dict[int, list[Row]] = {}
    for row, length in zip(rows, lengths, strict=True):
        by_length.setdefault(padded_to[length], []).append(row)
    chunks = []
    for length, same in sorted(by_length.items(), reverse=True):
        size = world_size * max(1, tokens_per_rank // length)
        for start in range(0, len(same), size):
            part = same[start : start + size]
            chunks.append(Chunk(length, tuple(tuple(part[rank::world_size]) for rank in range(world_size))))
    return chunks


def _merged_lengths(rows_of: Mapping[int, int], world_size: int) -> dict[int, int]:
    """Padded length -> the length its rows are padded to: the next longer one, where that is cheaper."""
    padded_to: dict[int, int] = {}
    longer = None
    for length in sorted(rows_of, reverse=True):
        rows_per_rank = -(-rows_of[length] // world_size)
        if longer is None or rows_per_rank * (longer - length) > PASS_TOKENS:
            longer = length
        padded_to[length] = longer
    return padded_to


@dataclass(frozen=True)
class Composition:
    """One tick. `taken[job]` chunks of each job are run; `credit` is carried to the next tick."""

    micro_batches: tuple[MicroBatch, ...]
    taken: Mapping[str, int]
    credit: Mapping[str, int]


def compose(
    waiting: Mapping[str, Sequence[Chunk]], credit: Mapping[str, int], tokens_per_tick: int
) -> Composition:
    """Deficit round-robin in padded tokens (Shreedhar and Varghese, SIGCOMM 1995), equal weights.

    `waiting[job]` are the chunks its current step still needs, in order. Every job earns the same share of
    `tokens_per_tick` and spends it on whole chunks; rounds repeat until at least one chunk is taken.
    """
    share = max(1, tokens_per_tick // max(1, len(waiting)))
    credit = {job: credit.get(job, 0) for job in waiting}
    taken = dict.fromkeys(waiting, 0)
    while waiting and not any(taken.values()):
        for job, chunks in waiting.items():
            credit[job] += share
            while taken[job] < len(chunks) and chunks[taken[job]].tokens <= credit[job]:
                credit[job] -= chunks[taken[job]].tokens
                taken[job] += 1
    for job, chunks in waiting.items():
        if taken[job] == len(chunks):
            credit[job] = min(credit[job], share)  # an idle job does not save up for a burst
    chosen = {job: list(chunks[: taken[job]]) for job, chunks in waiting.items()}
    return Composition(tuple(_pack(chosen, tokens_per_tick)), taken, credit)


def _pack(chosen: Mapping[str, list[Chunk]], tokens_per_micro_batch: int) -> list[MicroBatch]:
    """Merge chunks of equal length across jobs, longest first, never two of one job."""
    open_at: dict[int, list[tuple[str, Chunk]]] = {}
    packed: list[MicroBatch] = []
    queue = sorted(
        ((chunk, job, order) for job, chunks in chosen.items() for order, chunk in enumerate(chunks)),
        key=lambda item: (-item[0].padded_length, item[2]),
    )
    for chunk, job, _ in queue:
        pending = open_at.setdefault(chunk.padded_length, [])
        full = sum(other.tokens for _, other in pending) + chunk.tokens > tokens_per_micro_batch
        if pending and (full or any(job == other for other, _ in pending)):
            packed.append(MicroBatch(chunk.padded_length, tuple(pending)))
            pending.clear()
        pending.append((job, chunk))
    packed += [MicroBatch(length, tuple(pending)) for length, pending in open_at.items() if pending]
    return sorted(packed, key=lambda micro_batch: -micro_batch.padded_length)
