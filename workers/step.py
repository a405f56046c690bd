"""One lock-step forward and backward pass, and the one reduction that ends a tick.

The loss of a job's batch is the sum over its target tokens divided by the batch's target-token count, which
is known before the first micro-batch; so cutting a batch over micro-batches, ticks and ranks changes nothing,
and gradients are summed over ranks, never averaged. Rows that have a teacher are read by it first, in a pass
of its own without a gradient, which leaves the last hidden states at their targets; so a teacher costs one
reading, no backward pass and no logits. Shapes: R rows of T tokens, P target positions, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from workers.base import Base
from workers.compose import END_TO_END, MicroBatch
from workers.dropout import DropoutKey
from workers.head import Taught, target_hidden, target_loss
from workers.lora import Segment
from workers.ranks import Ranks
from workers.rows import Row
from workers.varlen import end_to_end


@dataclass(frozen=True)
class Share:
    """What a pass must know of a job: where its adapter is, what its masks and its loss depend on."""

    slot: int
    seed: int
    step: int
    dropout: float
    target_tokens: int
    """Of the job's whole batch, over all ranks and micro-batches."""


@dataclass(frozen=True)
class Span:
    """One job's targets [start, stop) among P. Each counts `weight / target_tokens` in its job's loss."""

    job: str
    start: int
    stop: int
    weight: float
    target_tokens: int


@dataclass(frozen=True)
class Batch:
    """This rank's part of a micro-batch. A rank without rows runs one dummy row of weight 0."""

    inputs: Mapping[str, Tensor]
    """The model's: [R, T], or [1, N] for rows that lie end to end."""
    ends: tuple[int, ...]
    """Where these begin and end, 0 first; empty for padded rows."""
    positions_P: Tensor
    labels_P: Tensor
    weights_P: Tensor
    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]


def forward_backward(
    base: Base, ranks: Ranks, micro_batch: MicroBatch, shares: Mapping[str, Share]
) -> dict[str, Tensor]:
    """Accumulate every present job's gradient. Returns this rank's part of each job's loss (scalars)."""
    micro_batch = _in_memory_order(base, micro_batch, shares)
    batch = build_batch(micro_batch, ranks.rank, shares, base.pad_id)
    taught = _read_by_teachers(base, ranks, micro_batch, shares, batch)
    with _laid_out(base, batch):
        total, losses_P = _losses(base, batch, taught)
        # Inside: with activation checkpointing the way back runs the layers forward once more.
        total.backward()
    return _by_job(batch, losses_P)


@torch.no_grad()
def forward_only(
    base: Base, ranks: Ranks, micro_batch: MicroBatch, shares: Mapping[str, Share]
) -> dict[str, Tensor]:
    """The losses alone, for validation."""
    batch = build_batch(micro_batch, ranks.rank, shares, base.pad_id)
    with _laid_out(base, batch):
        return _by_job(batch, _losses(base, batch)[1])


@contextmanager
def _laid_out(base: Base, batch: Batch) -> Generator[None]:
    """Within the block, passes hold the batch's rows, each seen by its own job's adapter."""
    with base.adapters.rows(batch.segments, batch.ends), end_to_end(batch.ends):
        yield


def _in_memory_order(base: Base, micro_batch: MicroBatch, shares: Mapping[str, Share]) -> MicroBatch:
    """Adapters that are neighbours in memory get neighbouring rows, so that products read them uncopied."""
    places = {job: base.slots[shares[job].slot].place.order for job, _ in micro_batch.chunks}
    return replace(micro_batch, chunks=tuple(sorted(micro_batch.chunks, key=lambda chunk: places[chunk[0]])))


def reduce_gradients(ranks: Ranks, weights: Sequence[nn.Parameter]) -> list[Callable[[], object]]:
    """Begin to sum over ranks the gradients of all jobs that end their step in this tick.

    Returns what waits for each: one job's optimizer works while the next one's sum is under way. Each sums
    its slot's own flat buffer, so its last bits cannot depend on who else ends a step.
    """
    return [ranks.begin_sum(weight.grad) for weight in weights if weight.grad is not None]


def build_batch(micro_batch: MicroBatch, rank: int, shares: Mapping[str, Share], pad_id: int) -> Batch:
    rows: list[Row] = []
    begins = [0]
    """Where each row begins, and last where the next one would."""
    segments: list[Segment] = []
    spans: list[Span] = []
    targets: list[tuple[int, int, float]] = []
    for job, chunk in micro_batch.chunks:
        share, mine = shares[job], chunk.rows[rank]
        weight, count = 1.0, share.target_tokens
        if chunk.lesson:
            weight, count = chunk.lesson.weight, chunk.lesson.target_tokens
        first_target = len(targets)
        for row in mine:
            targets += _targets(row, begins[-1], weight / count)
            rows.append(row)
            begins.append(begins[-1] + (micro_batch.padded_length or len(row.input_ids)))
        if mine:
            keys = _dropout_keys(mine, share) if share.dropout else ()
            segments.append(Segment(share.slot, len(rows) - len(mine), len(rows), keys))
            spans.append(Span(job, first_target, len(targets), weight, count))
    targets = targets or [(0, 0, 0.0)]
    positions, labels, weights = zip(*targets, strict=True)
    return Batch(
        *_laid([row.input_ids for row in rows], micro_batch.padded_length, pad_id),
        torch.tensor(positions),
        torch.tensor(labels),
        torch.tensor(weights, dtype=torch.float64),
        tuple(segments),
        tuple(spans),
    )


def _targets(row: Row, begin: int, weight: float) -> list[tuple[int, int, float]]:
    """(flat position, label, weight) of the row's targets: the token before a label predicts it."""
    return [
        (begin + position - 1, label, weight)
        for position, label in enumerate(row.labels)
        if label != -100 and position > 0
    ]


def target_count(rows: Sequence[Row]) -> int:
    return sum(label != -100 for row in rows for label in row.labels[1:])


def _dropout_keys(rows: Sequence[Row], share: Share) -> tuple[DropoutKey, ...]:
    return tuple(DropoutKey(share.seed, share.step, row.sample, len(row.input_ids)) for row in rows)


def _laid(
    rows: Sequence[Sequence[int]], padded_length: int, pad_id: int
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """A model's inputs and where rows end to end begin and end; one row of padding where there is none.

    Right padding: under a causal mask no real token sees it, so no attention mask is needed.
    """
    if padded_length != END_TO_END:
        padded = [[*row, *[pad_id] * (padded_length - len(row))] for row in rows or [()]]
        return {"input_ids": torch.tensor(padded)}, ()
    rows = rows or [(pad_id,)]
    tokens = torch.tensor([[token for row in rows for token in row]])
    places = torch.tensor([[place for row in rows for place in range(len(row))]])
    return {"input_ids": tokens, "position_ids": places}, tuple(accumulate(map(len, rows), initial=0))


def _read_by_teachers(
    base: Base, ranks: Ranks, micro_batch: MicroBatch, shares: Mapping[str, Share], batch: Batch
) -> tuple[Taught, ...]:
    """This rank's targets that have a teacher, once it has read them. Collective if any chunk has one."""
    lessons = {job: chunk.lesson for job, chunk in micro_batch.chunks if chunk.readings > 1}
    if not lessons:
        return ()
    rows = MicroBatch(
        micro_batch.padded_length, tuple(item for item in micro_batch.chunks if item[0] in lessons)
    )
    readers = {
        job: replace(shares[job], slot=lesson.teacher, dropout=0.0)
        for job, lesson in lessons.items()
        if lesson is not None and lesson.teacher is not None
    }
    read = build_batch(rows, ranks.rank, readers, base.pad_id)
    with _laid_out(base, read):
        hidden_QH = target_hidden(
            base.model, read.positions_P.to(base.device), **_on(base.device, read.inputs)
        )
    own = {span.job: span for span in batch.spans}
    return tuple(
        Taught(
            own[span.job].start,
            own[span.job].stop,
            hidden_QH[span.start : span.stop],
            lesson.labels,
            lesson.temperature,
        )
        for span in read.spans
        if (lesson := lessons[span.job])
    )


def _losses(base: Base, batch: Batch, taught: tuple[Taught, ...] = ()) -> tuple[Tensor, Tensor]:
    """The weighted sum of all targets' losses, to go back from, and each one [P]."""
    device = base.device
    return target_loss(
        base.model,
        batch.positions_P.to(device),
        batch.labels_P.to(device),
        batch.weights_P.to(device),
        taught,
        **_on(device, batch.inputs),
    )


def _on(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _by_job(batch: Batch, losses_P: Tensor) -> dict[str, Tensor]:
    """Each job's part of its batch loss, summed in float64 so that the order of rows does not show."""
    exact_P = losses_P.double()
    return {
        span.job: exact_P[span.start : span.stop].sum() * span.weight / span.target_tokens
        for span in batch.spans
    }
