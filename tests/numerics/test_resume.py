"""Resume: detached and attached again, or the process gone, equals never interrupted, bit for bit."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.numerics.jobs import adapters, attach, run, test_base, three_jobs
from workers import checkpoint
from workers.host import Host
from workers.ranks import Ranks
from workers.types import Attach, Attached, CheckpointSaved, Detach, JobSpec, StepDone, Validated


def dropped_out(job: JobSpec) -> JobSpec:
    return replace(job, adapter=replace(job.adapter, lora_dropout=0.2))


def test_resume_after_preemptions_at_random_ticks_is_bit_identical(tmp_path):
    base = test_base(tmp_path, tokens_per_tick=700)
    jobs = [dropped_out(job) for job in three_jobs(tmp_path, steps=14)]
    undisturbed = adapters(run(base, {0: attach(*jobs)}))

    moved = [replace(job, checkpoint_dir=job.checkpoint_dir + "-again") for job in jobs]
    draw, script, attempts = random.Random(5), {0: attach(*moved)}, dict.fromkeys(range(3), 1)
    for tick in sorted(draw.sample(range(2, 30), 6)):
        victim = draw.randrange(3)
        job = replace(moved[victim], attempt=attempts[victim] + 1)
        script.setdefault(tick, []).append(Detach(job.job, attempts[victim]))
        script.setdefault(tick + 2, []).append(Attach(job))
        attempts[victim] += 1
    events = run(base, script)
    assert max(event.step for event in events if isinstance(event, Attached)) > 0
    assert_same(adapters(events), undisturbed)


def test_resume_in_a_new_process_from_the_newest_checkpoint_is_bit_identical(tmp_path):
    base = test_base(tmp_path)
    jobs = three_jobs(tmp_path, steps=14)
    undisturbed = adapters(run(base, {0: attach(*jobs)}))

    moved = [replace(job, checkpoint_dir=job.checkpoint_dir + "-again") for job in jobs]
    lost = Host.load(base, Ranks())
    for command in attach(*moved):
        lost.apply(command)
    told: list[object] = []
    while not any(isinstance(event, CheckpointSaved) for event in told):
        told += lost.tick()
    events = run(base, {0: attach(*(replace(job, attempt=2) for job in moved))})
    assert any(event.step > 0 for event in events if isinstance(event, Attached))
    assert_same(adapters(events), undisturbed)


def test_resume_tells_what_came_before_its_checkpoint_again(tmp_path):
    base = test_base(tmp_path)
    job = three_jobs(tmp_path, steps=14)[0]
    job = replace(job, validation=job.train, training=replace(job.training, saves_per_epoch=2))
    told = figures(run(base, {0: attach(job)}))
    shutil.rmtree(checkpoint.newest(Path(job.checkpoint_dir)))
    shutil.rmtree(Path(job.checkpoint_dir) / "adapter")
    # Killed again, right after the first new checkpoint and before anybody listened.
    run(base, {0: attach(replace(job, attempt=2))})
    shutil.rmtree(Path(job.checkpoint_dir) / "adapter")
    events = run(base, {0: attach(replace(job, attempt=3))})
    assert next(event.step for event in events if isinstance(event, Attached)) == 14
    assert figures(events) == told
    assert {event.attempt for event in events if isinstance(event, StepDone | Validated)} == {3}


def figures(events):
    told = [event for event in events if isinstance(event, StepDone | Validated)]
    return [(type(event).__name__, event.step, event.loss) for event in told]


def test_resume_passes_over_a_torn_checkpoint(tmp_path):
    base = test_base(tmp_path)
    job = three_jobs(tmp_path, steps=14)[0]
    run(base, {0: attach(job)})
    folder = Path(job.checkpoint_dir)
    good, torn = sorted(folder.glob("step-*"))[-2:]
    weights = torn / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert checkpoint.newest(folder) == good


def test_checkpoints_keep_the_newest_two(tmp_path):
    base = test_base(tmp_path)
    job = three_jobs(tmp_path, steps=14)[0]
    job = replace(job, training=replace(job.training, saves_per_epoch=6))
    run(base, {0: attach(job)})
    kept = sorted(path.name for path in Path(job.checkpoint_dir).iterdir())
    assert kept == ["adapter", "step-000013", "step-000014"]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for job, adapter in expected.items():
        for name, pair in adapter.factors.items():
            assert torch.equal(found[job].factors[name][0], pair[0]), (job, name)
            assert torch.equal(found[job].factors[name][1], pair[1]), (job, name)


def test_a_job_attached_twice_stays_and_a_later_attempt_takes_the_place_of_its_former_one(tmp_path):
    host = Host.load(test_base(tmp_path), Ranks())
    job = three_jobs(tmp_path, steps=3)[0]
    assert host.apply(Attach(job))
    slot = host.residents[job.job].slot
    assert host.apply(Attach(job)) == []
    host.tick()
    assert host.residents[job.job].step == 1
    assert host.apply(Attach(replace(job, attempt=2)))
    assert host.residents[job.job].spec.attempt == 2
    assert len(host.residents) == 1
    with pytest.raises(KeyError):
        host.base.slots[slot]
