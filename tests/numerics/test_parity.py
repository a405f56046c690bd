"""Parity: trained together equals trained alone by plain PEFT and torch.optim.AdamW."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.jobs import adapters, attach, distance, first_adapter, run, test_base, three_jobs
from tests.numerics.reference import train_alone
from workers.types import Attach, JobSpec, StepDone


def losses(events, job):
    return [event.loss for event in events if isinstance(event, StepDone) and event.job == job]


def largest_gap(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def join_late(jobs: list[JobSpec], tick: int) -> dict[int, list]:
    return {0: attach(*jobs[:-1]), tick: [Attach(jobs[-1])]}


def test_parity_one_rank_float32_equal_lengths_is_bit_identical(tmp_path):
    base = test_base(tmp_path)
    jobs = three_jobs(tmp_path, same_length=True)
    events = run(base, join_late(jobs, tick=7))
    found = adapters(events)
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job))
        assert losses(events, job.job) == alone.losses
        for name, pair in alone.factors.items():
            assert torch.equal(found[job.job].factors[name][0], pair[0]), name
            assert torch.equal(found[job.job].factors[name][1], pair[1]), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parity_mixed_lengths_and_late_join_agrees(tmp_path, dtype, world_size):
    base = test_base(tmp_path, dtype=dtype, tokens_per_tick=1024)
    jobs = three_jobs(tmp_path)
    events = run(base, join_late(jobs, tick=7), world_size)
    found = adapters(events)
    bound = 1e-5 if dtype == "float32" else 1e-12
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job))
        assert largest_gap(losses(events, job.job), alone.losses) < bound
        assert distance(found[job.job].factors, alone.factors) < bound


@pytest.mark.parametrize("world_size", [1, 2])
def test_parity_fused_arithmetic_agrees(tmp_path, world_size):
    base = test_base(tmp_path, arithmetic="fused", tokens_per_tick=1024)
    jobs = three_jobs(tmp_path)
    events = run(base, join_late(jobs, tick=7), world_size)
    found = adapters(events)
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job))
        assert largest_gap(losses(events, job.job), alone.losses) < 1e-5
        assert distance(found[job.job].factors, alone.factors) < 1e-5


def test_parity_neighbours_and_budget_change_no_bit(tmp_path):
    """Stronger than the contract: with the same ranks, composition never shows in the result."""
    jobs = three_jobs(tmp_path, steps=12)
    together = adapters(run(test_base(tmp_path, tokens_per_tick=512), join_late(jobs, tick=3)))
    for job in jobs:
        alone = replace(job, checkpoint_dir=str(tmp_path / "alone" / job.job))
        single = adapters(run(test_base(tmp_path, tokens_per_tick=512), {0: attach(alone)}))
        for name, pair in single[job.job].factors.items():
            assert torch.equal(together[job.job].factors[name][0], pair[0]), name
            assert torch.equal(together[job.job].factors[name][1], pair[1]), name
