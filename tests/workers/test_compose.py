"""Composition: every chunk once and in order, equal shapes on every rank, fair in tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.compose import Chunk, compose, cut_step, padded_length
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
    assert large_taken == 20  # half of the budget, in tokens
