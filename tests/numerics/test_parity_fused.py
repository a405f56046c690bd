"""Fused arithmetic on a CPU: within the contract of plain PEFT, and the same bits with any neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.numerics.jobs import (
    adapters,
    assert_same_bits,
    attach,
    distance,
    first_adapter,
    run,
    test_base,
    three_jobs,
)
from tests.numerics.reference import train_alone
from workers.types import Attach, StepDone


@pytest.mark.parametrize("world_size", [1, 2])
def test_fused_arithmetic_agrees_with_peft(tmp_path, world_size):
    base = test_base(tmp_path, arithmetic="fused", tokens_per_tick=1024)
    jobs = three_jobs(tmp_path)
    events = run(base, {0: attach(*jobs[:-1]), 7: [Attach(jobs[-1])]}, world_size)
    found = adapters(events)
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job))
        losses = [event.loss for event in events if isinstance(event, StepDone) and event.job == job.job]
        assert max(abs(f - e) / e for f, e in zip(losses, alone.losses, strict=True)) < 1e-5
        assert distance(found[job.job].factors, alone.factors) < 1e-5


def test_fused_arithmetic_neighbours_and_budget_change_no_bit(tmp_path):
    base = test_base(tmp_path, arithmetic="fused", tokens_per_tick=512, chunk_tokens=512)
    jobs = three_jobs(tmp_path, steps=12, same_length=True)
    together = adapters(run(base, {0: attach(*jobs[:-1]), 3: [Attach(jobs[-1])]}))
    for job in jobs:
        alone = replace(job, checkpoint_dir=str(tmp_path / "alone" / job.job))
        single = adapters(run(replace(base, tokens_per_tick=2048), {0: attach(alone)}))
        assert_same_bits(together[job.job].factors, single[job.job].factors, job.job)
