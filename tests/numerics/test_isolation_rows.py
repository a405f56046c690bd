"""Isolation by construction: a row belongs to one job, and no attention mask stands between two."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.jobs import attach, drive, test_base, three_jobs
from workers.compose import compose, cut_step
from workers.host import Host
from workers.ranks import Ranks
from workers.rows import Row
from workers.step import Share, build_batch

jobs = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(2, 200), min_size=1, max_size=9), min_size=1
)
PAD = 0


def rows_of(job: str, lengths: list[int]) -> list[Row]:
    """Rows whose every token names its job."""
    return [Row(i, (ord(job),) * length, (ord(job),) * length) for i, length in enumerate(lengths)]


@given(jobs, st.integers(1, 3), st.integers(64, 2000))
def test_isolation_a_row_holds_one_jobs_tokens_and_is_in_that_jobs_segment_alone(lengths, ranks, budget):
    waiting = {job: cut_step(rows_of(job, each), ranks, budget, 4096) for job, each in lengths.items()}
    shares = {job: Share(slot, 0, 0, 0.0, 1) for slot, job in enumerate(waiting)}
    owner = {share.slot: ord(job) for job, share in shares.items()}
    for micro_batch in compose(waiting, {}, budget).micro_batches:
        for rank in range(ranks):
            batch = build_batch(micro_batch, rank, shares, PAD)
            covered = [row for segment in batch.segments for row in range(segment.start, segment.stop)]
            rows = (
                len(batch.inputs["input_ids"]) if batch.segments else 0
            )  # a rank without rows has one dummy
            assert covered == list(range(rows))
            for segment in batch.segments:
                held = set(batch.inputs["input_ids"][segment.start : segment.stop].flatten().tolist())
                assert held - {PAD} == {owner[segment.slot]}


def test_isolation_no_attention_mask_reaches_the_model_or_a_layer(tmp_path):
    host, masks = Host.load(test_base(tmp_path, tokens_per_tick=700), Ranks()), []
    watched = [host.base.model, *(layer.self_attn for layer in host.base.model.model.layers)]
    for module in watched:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
    drive(host, {0: attach(*three_jobs(tmp_path, steps=3))})
    assert len(masks) >= 3 * len(watched)
    assert set(masks) == {None}
