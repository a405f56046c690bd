"""What goes into a tick: which rows of which jobs, in which micro-batches, on which ranks. Pure.

A job's step is cut into *chunks* by the job alone: its rows grouped by length so that padding and passes
together cost least, and dealt to the ranks. A chunk is an atom: it is one segment of one micro-batch on each
rank, padded to its own length, and a job's chunks run in their own order. So a job's gradient is the same sum
in the same order whoever its neighbours are and whatever the budget is; composition decides only when a chunk
runs and beside whom.

Every rank computes the same composition, hence the same number of micro-batches of the same shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.rows import Row

PASS_TOKENS = 256
"""A pass of its own gathers the base twice; that costs about as much as so many padded tokens in another."""
END_TO_END = 0
"""Instead of a padded length: rows lie in one sequence, as long as they are (`workers.varlen`)."""
SHORTEST = 16
"""Padded lengths start here: a float32 product with fewer rows may differ in its last bit."""


@dataclass(frozen=True)
class Lesson:
    """How the targets of some rows count in a step, where that is not by their number alone."""

    target_tokens: int
    """Of these rows, over all ranks and micro-batches: the loss is their mean ..."""
    weight: float
    """... times this."""
    teacher: int | None = None
    """The slot of the adapter that reads them too; None for the labels alone."""
    labels: float = 1.0
    temperature: float = 1.0

    @property
    def readings(self) -> int:
        """How often a pass reads a row."""
        return 1 if self.teacher is None else 2


@dataclass(frozen=True)
class Chunk:
    """Rows of one job's step that share a padded length T; `rows[rank]` may be empty on some ranks."""

    padded_length: int
    """Or END_TO_END."""
    rows: tuple[tuple[Row, ...], ...]
    lesson: Lesson | None = None

    @property
    def readings(self) -> int:
        return self.lesson.readings if self.lesson else 1

    @property
    def tokens(self) -> int:
        """Padded tokens of the fullest rank, a teacher's reading of them included."""
        return max(map(self._laid, self.rows)) * self.readings

    @property
    def rows_per_rank(self) -> int:
        """Rows of the fullest rank."""
        return max(len(rows) for rows in self.rows)

    @property
    def padded_tokens(self) -> int:
        """Padded tokens over all ranks."""
        return sum(map(self._laid, self.rows)) * self.readings

    @property
    def longest(self) -> int:
        """Tokens of the longest row, padding included."""
        return self.padded_length or max(len(row.input_ids) for rows in self.rows for row in rows)

    def _laid(self, rows: Sequence[Row]) -> int:
        return len(rows) * self.padded_length or sum(len(row.input_ids) for row in rows)


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass: at most one chunk a job, all of one padded length or END_TO_END."""

    padded_length: int
    chunks: tuple[tuple[str, Chunk], ...]
    """(job, chunk), in order of residence."""

    @property
    def tokens(self) -> int:
        """Padded tokens a rank holds, at most."""
        return sum(chunk.tokens for _, chunk in self.chunks)


# ---- a step becomes chunks --------------------------------------------------------------------------------


def padded_length(tokens: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, then steps of an eighth of the next power of two.

    Few enough that jobs of different lengths meet in one pass.
    """
    step = max(SHORTEST, (1 << max(tokens - 1, 1).bit_length()) // 8)
    return -(-tokens // step) * step


def close_length(tokens: int) -> int:
    """The next of 16, 20, 24, ..., 128, then steps of a 32nd of the next power of two: at most 1/16 longer
    from 128 on, for rows that fill a pass by themselves."""
    step = max(4, (1 << max(tokens - 1, 1).bit_length()) // 32)
    return max(SHORTEST, -(-tokens // step) * step)


def cut_step(
    rows: Sequence[Row], world_size: int, chunk_tokens: int, longest: int, lesson: Lesson | None = None
) -> list[Chunk]:
    """One step's rows as chunks, longest first, rows in batch order within each.

    Depends on the job's own rows, the number of ranks and the base file's `chunk_tokens` only. No chunk
    exceeds `chunk_tokens` padded tokens on a rank, unless a single row does; no row is padded past `longest`,
    the base's last position.
    """
    lengths = [max(len(row.input_ids), min(close_length(len(row.input_ids)), longest)) for row in rows]
    padded_to = _grouped_lengths(Counter(lengths), world_size, longest)
    by_length: dict[int, list[Row]] = {}
    for row, length in zip(rows, lengths, strict=True):
        by_length.setdefault(padded_to[length], []).append(row)
    chunks: list[Chunk] = []
    row_tokens = chunk_tokens // (lesson.readings if lesson else 1)
    for length, same in sorted(by_length.items(), reverse=True):
        size = world_size * max(1, row_tokens // length)
        chunks += [
            Chunk(length, _deal(same[start : start + size], world_size), lesson)
            for start in range(0, len(same), size)
        ]
    return chunks


def cut_step_end_to_end(
    rows: Sequence[Row], world_size: int, chunk_tokens: int, lesson: Lesson | None = None
) -> list[Chunk]:
    """As `cut_step`, without padding: rows of any lengths share a chunk, the longest first.

    Dealt to the ranks in this order, the ranks get rows of about the same lengths.
    """
    row_tokens = chunk_tokens // (lesson.readings if lesson else 1)
    chunks: list[Chunk] = []
    waiting: list[Row] = []
    tokens = 0
    by_length = sorted(rows, key=lambda row: -len(row.input_ids))
    for start in range(0, len(by_length), world_size):
        deal = by_length[start : start + world_size]
        if waiting and tokens + len(deal[0].input_ids) > row_tokens:
            chunks.append(Chunk(END_TO_END, _deal(waiting, world_size), lesson))
            waiting, tokens = [], 0
        waiting += deal
        tokens += len(deal[0].input_ids)  # of the fullest rank, at most
    return [*chunks, Chunk(END_TO_END, _deal(waiting, world_size), lesson)] if waiting else chunks


def _deal(rows: Sequence[Row], world_size: int) -> tuple[tuple[Row, ...], ...]:
    """Rows to ranks in turn. The first row's sample says where to begin: else rank 0 had every odd row."""
    first = rows[0].sample
    return tuple(tuple(rows[(rank - first) % world_size :: world_size]) for rank in range(world_size))


def _grouped_lengths(rows_of: Mapping[int, int], world_size: int, longest: int) -> dict[int, int]:
    """Length -> the length its rows are padded to, so that padded tokens plus passes cost least.

    `best[i]` is the least cost of the `i` shortest lengths, and where its last group begins.
    """
    lengths = sorted(rows_of)
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(lengths) + 1):
        rows, options = 0, []
        for start in range(stop - 1, -1, -1):
            rows += rows_of[lengths[start]]
            length = meeting_length(lengths[stop - 1], -(-rows // world_size), longest)
            options.append((best[start][0] + rows * length + PASS_TOKENS * world_size, start))
        best.append(min(options))
    padded_to: dict[int, int] = {}
    stop = len(lengths)
    while stop:
        start = best[stop][1]
        rows = sum(rows_of[length] for length in lengths[start:stop])
        length = meeting_length(lengths[stop - 1], -(-rows // world_size), longest)
        padded_to |= dict.fromkeys(lengths[start:stop], length)
        stop = start
    return padded_to


def meeting_length(length: int, rows_per_rank: int, longest: int) -> int:
    """`length`, or the coarser one where other jobs are met if getting there costs less than a pass."""
    coarse = max(length, min(padded_length(length), longest))
    return coarse if rows_per_rank * (coarse - length) <= PASS_TOKENS else length


# ---- chunks become a tick ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """One tick. `taken[job]` chunks of each job are run; `credit` is carried to the next tick."""

    micro_batches: tuple[MicroBatch, ...]
    taken: Mapping[str, int]
    credit: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Padded tokens of a rank, over all micro-batches."""
        return sum(micro_batch.tokens for micro_batch in self.micro_batches)


def compose(
    waiting: Mapping[str, Sequence[Chunk]],
    credit: Mapping[str, int],
    tokens_per_tick: int,
    weights: Mapping[str, int] | None = None,
    tokens_per_pass: int | None = None,
) -> Composition:
    """Deficit round-robin in padded tokens (Shreedhar and Varghese, SIGCOMM 1995), weighted.

    `waiting[job]` are the chunks its current step still needs, in order. In every round the jobs that still
    have some earn what is left of `tokens_per_tick` by weight (1 where none is given) and spend it on whole
    chunks. Rounds repeat until the budget is spent, by at most a chunk a job too much, and one chunk at least
    is taken. A micro-batch holds `tokens_per_pass` at most (`tokens_per_tick` where none is given), or a
    single chunk.
    """
    weight = {job: (weights or {}).get(job, 1) for job in waiting}
    credit = {job: credit.get(job, 0) for job in waiting}
    taken = dict.fromkeys(waiting, 0)
    left, unfinished = tokens_per_tick, [job for job in waiting if waiting[job]]
    while unfinished and left > 0:
        shares = _shares(left, {job: weight[job] for job in unfinished})
        spent = 0
        for job, share in shares.items():
            spent += _spend(job, share, waiting[job], credit, taken)
        unfinished = [job for job in unfinished if taken[job] < len(waiting[job])]
        if spent == 0 and any(taken.values()):
            break
        left -= spent
    shares = _shares(tokens_per_tick, weight)
    for job, chunks in waiting.items():
        if taken[job] == len(chunks):
            credit[job] = min(credit[job], shares[job])  # an idle job does not save up for a burst
    chosen = {job: list(chunks[: taken[job]]) for job, chunks in waiting.items()}
    return Composition(tuple(_pack(chosen, tokens_per_pass or tokens_per_tick)), taken, credit)


def _shares(tokens: int, weight: Mapping[str, int]) -> dict[str, int]:
    total = sum(weight.values())
    return {job: max(1, tokens * own // total) for job, own in weight.items()}


def _spend(
    job: str, share: int, chunks: Sequence[Chunk], credit: dict[str, int], taken: dict[str, int]
) -> int:
    """Earn `share`, take the next chunks it pays for; the tokens spent."""
    credit[job] += share
    before = credit[job]
    while taken[job] < len(chunks) and chunks[taken[job]].tokens <= credit[job]:
        credit[job] -= chunks[taken[job]].tokens
        taken[job] += 1
    return before - credit[job]


def _pack(chosen: Mapping[str, list[Chunk]], tokens_per_pass: int) -> list[MicroBatch]:
    """Best fit within each length, longest first: never two chunks of a job together, its order kept."""
    residence = {job: index for index, job in enumerate(chosen)}
    by_length: dict[int, list[tuple[int, str, Chunk]]] = {}
    for job, chunks in chosen.items():
        for order, chunk in enumerate(chunks):
            by_length.setdefault(chunk.padded_length, []).append((order, job, chunk))
    packed: list[MicroBatch] = []
    for length, found in sorted(by_length.items(), reverse=True):
        found.sort(key=lambda item: (item[0], -item[2].tokens, residence[item[1]]))
        for bin_ in _best_fit([(job, chunk) for _, job, chunk in found], tokens_per_pass):
            bin_.sort(key=lambda item: residence[item[0]])
            packed.append(MicroBatch(length, tuple(bin_)))
    return packed


def _best_fit(found: Sequence[tuple[str, Chunk]], tokens_per_pass: int) -> list[list[tuple[str, Chunk]]]:
    """Each chunk in the fullest bin that takes it, behind its job's chunk before; else in a new one."""
    bins: list[list[tuple[str, Chunk]]] = []
    room: list[int] = []
    after: dict[str, int] = {}
    for job, chunk in found:
        fitting = [i for i in range(after.get(job, 0), len(bins)) if chunk.tokens <= room[i]]
        best = min(fitting, key=lambda i: room[i], default=len(bins))
        if best == len(bins):
            bins.append([])
            room.append(tokens_per_pass)
        bins[best].append((job, chunk))
        room[best] -= chunk.tokens
        after[job] = best + 1
    return bins
