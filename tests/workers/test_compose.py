"""Composition: every chunk once and in order, equal shapes on every rank, fair in tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.compose import (
    PASS_TOKENS,
    Chunk,
    compose,
    cut_step,
    cut_step_end_to_end,
    padded_length,
)
from workers.rows import Row

rows = st.lists(st.integers(2, 300), min_size=1, max_size=20).map(
    lambda lengths: [Row(i, tuple(range(n)), (-100,) + (1,) * (n - 1)) for i, n in enumerate(lengths)]
)
jobs = st.dictionaries(st.sampled_from("abcdef"), rows, min_size=1)


@given(st.integers(1, 100_000))
def test_padded_length_is_never_shorter_and_wastes_at_most_an_eighth_or_sixteen(tokens):
    length = padded_length(tokens)
    assert tokens <= length
    assert length - tokens < max(16, (tokens + 1) / 4)
    assert padded_length(length) == length


@given(rows, st.integers(1, 4), st.integers(16, 2000))
def test_cut_step_places_every_row_once_within_the_budget(batch, world_size, budget):
    chunks = cut_step(batch, world_size, budget, longest=4096)
    placed = [row.sample for chunk in chunks for rank in chunk.rows for row in rank]
    assert sorted(placed) == [row.sample for row in batch]
    for chunk in chunks:
        assert len(chunk.rows) == world_size
        assert chunk.tokens <= budget or max(len(rank) for rank in chunk.rows) == 1
        assert max(map(len, chunk.rows)) - min(map(len, chunk.rows)) <= 1
    assert [c.padded_length for c in chunks] == sorted((c.padded_length for c in chunks), reverse=True)


@given(rows, st.integers(1, 4), st.integers(16, 2000))
def test_cut_step_end_to_end_places_every_row_once_within_the_budget_and_pads_nothing(
    batch, world_size, budget
):
    chunks = cut_step_end_to_end(batch, world_size, budget)
    placed = [row for chunk in chunks for rank in chunk.rows for row in rank]
    assert sorted(row.sample for row in placed) == [row.sample for row in batch]
    assert sum(chunk.padded_tokens for chunk in chunks) == sum(len(row.input_ids) for row in batch)
    for chunk in chunks:
        assert chunk.tokens <= budget or max(map(len, chunk.rows)) == 1
        assert max(map(len, chunk.rows)) - min(map(len, chunk.rows)) <= 1


def test_compose_lets_rows_end_to_end_of_all_lengths_meet_in_one_pass():
    batches = {
        job: [Row(0, (1,) * length, (1,) * length)] for job, length in (("a", 7), ("b", 40), ("c", 300))
    }
    waiting = {job: cut_step_end_to_end(batch, 1, 512) for job, batch in batches.items()}
    (micro_batch,) = compose(waiting, {}, 1000).micro_batches
    assert micro_batch.tokens == 347


@given(jobs, st.integers(1, 3), st.integers(16, 2000))
def test_compose_runs_every_chunk_once_in_its_jobs_order(batches, world_size, budget):
    waiting = {job: cut_step(batch, world_size, budget, 4096) for job, batch in batches.items()}
    left = {job: list(chunks) for job, chunks in waiting.items()}
    ran: dict[str, list[Chunk]] = {job: [] for job in waiting}
    credit: dict[str, int] = {}
    while any(left.values()):
        pending = {job: chunks for job, chunks in left.items() if chunks}
        composition = compose(pending, credit, budget)
        assert any(composition.taken.values())
        credit = dict(composition.credit)
        for micro_batch in composition.micro_batches:
            present = [job for job, _ in micro_batch.chunks]
            assert len(set(present)) == len(present)
            assert all(chunk.padded_length == micro_batch.padded_length for _, chunk in micro_batch.chunks)
            for job, chunk in micro_batch.chunks:
                ran[job].append(chunk)
        for job, taken in composition.taken.items():
            del left[job][:taken]
    assert ran == waiting


def test_compose_gives_a_small_job_its_step_every_tick_beside_a_large_one():
    small = [Chunk(16, ((Row(0, (1,) * 16, (1,) * 16),),))]
    large = [Chunk(512, ((Row(i, (1,) * 512, (1,) * 512),),)) for i in range(50)]
    credit: dict[str, int] = {}
    large_taken = 0
    for _ in range(10):
        composition = compose({"small": small, "large": large[large_taken:]}, credit, 2048)
        credit = dict(composition.credit)
        assert composition.taken["small"] == 1
        large_taken += composition.taken["large"]
    assert large_taken == 40  # all that the small one leaves of the budget, to a chunk


def chunk(tokens: int, length: int = 16, first: int = 0) -> Chunk:
    """One rank's chunk of `tokens` padded tokens."""
    rows = tuple(Row(first + i, (1,) * length, (1,) * length) for i in range(tokens // length))
    return Chunk(length, (rows,))


def tokens_taken(weights: dict[str, int], ticks: int, budget: int) -> dict[str, int]:
    """Tokens of each job after some ticks in which all have chunks without end, of different sizes."""
    backlog = {job: [chunk(64 * (1 + index))] * 1000 for index, job in enumerate(weights)}
    credit: dict[str, int] = {}
    total = dict.fromkeys(weights, 0)
    for _ in range(ticks):
        composition = compose(backlog, credit, budget, weights)
        credit = dict(composition.credit)
        for job, taken in composition.taken.items():
            total[job] += taken * backlog[job][0].tokens
    return total


def test_compose_shares_the_budget_by_weight():
    taken = tokens_taken({"low": 25, "normal": 50, "high": 75}, ticks=60, budget=1200)
    assert abs(sum(taken.values()) - 60 * 1200) <= 60 * (64 + 128 + 192)
    for job, share in {"low": 1 / 6, "normal": 2 / 6, "high": 3 / 6}.items():
        assert abs(taken[job] / sum(taken.values()) - share) < 0.01


def test_compose_job_of_the_least_weight_is_not_starved():
    taken = tokens_taken({"least": 1, "most": 100}, ticks=400, budget=256)
    assert taken["least"] > 0


def test_compose_packs_by_best_fit_into_fewer_passes_than_first_come_would():
    chunks = {"a": [chunk(160)], "b": [chunk(96)], "c": [chunk(80)], "d": [chunk(160)], "e": [chunk(16)]}
    found = compose(chunks, {}, tokens_per_tick=1024, tokens_per_pass=256).micro_batches
    assert [[job for job, _ in micro_batch.chunks] for micro_batch in found] == [["a", "b"], ["c", "d", "e"]]


@given(jobs, st.integers(16, 2000), st.integers(16, 500))
def test_compose_pass_holds_its_bound_or_a_single_chunk(batches, budget, bound):
    waiting = {job: cut_step(batch, 2, 256, 4096) for job, batch in batches.items()}
    for micro_batch in compose(waiting, {}, budget, tokens_per_pass=bound).micro_batches:
        assert micro_batch.tokens <= bound or len(micro_batch.chunks) == 1


def padding(rows_per_rank: int, world_size: int) -> float:
    """Padding of a step of rows of 100 to 500 tokens, as a share of the real ones."""
    draw = random.Random(7)
    lengths = [draw.randint(100, 500) for _ in range(rows_per_rank * world_size)]
    chunks = cut_step([Row(i, (1,) * n, (1,) * n) for i, n in enumerate(lengths)], world_size, 4096, 4096)
    return sum(chunk.padded_tokens for chunk in chunks) / sum(lengths) - 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_cut_step_pads_at_most_a_tenth_once_a_job_has_enough_rows(world_size):
    assert padding(64, world_size) < 0.10
    assert padding(256, world_size) < 0.06


@given(rows, st.integers(1, 3))
def test_cut_step_padding_and_passes_cost_no_more_than_one_group_would(batch, world_size):
    chunks = cut_step(batch, world_size, 1 << 30, 4096)
    longest = padded_length(max(len(row.input_ids) for row in batch))
    cost = sum(chunk.padded_tokens for chunk in chunks) + len(chunks) * PASS_TOKENS * world_size
    assert cost <= longest * len(batch) + PASS_TOKENS * world_size


def test_cut_step_deals_odd_rows_to_every_rank():
    """Chunks of one row each: were they all rank 0's, the other would only ever run dummies."""
    first = [cut_step([Row(sample, (1,) * 20, (1,) * 20)], 2, 256, 4096)[0].rows for sample in range(10)]
    assert sum(bool(rank_0) for rank_0, _ in first) == 5
