"""Distillation in the host equals plain PEFT with the teachers as further adapters, whoever is beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.numerics.distil import STEPS, distil_alone, parents, student
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
from tests.numerics.pair import two_ranks
from tests.numerics.test_isolation import base_with_a_poisonous_byte, elsewhere, poisoned
from workers.adapter import adapter_config, read_adapter, write_adapter
from workers.fuse import fuse
from workers.host import Host
from workers.manifest import publish_folder
from workers.ranks import Ranks
from workers.types import Attach, Attached, Detach, JobStopped, StepDone, Validated


def losses(events, job):
    return [event.loss for event in events if isinstance(event, StepDone) and event.job == job]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_distillation_equals_a_plain_peft_loop_with_the_teachers_as_adapters(
    tmp_path, dtype, bound, world_size
):
    base = test_base(tmp_path, dtype=dtype, tokens_per_tick=700)
    job = student(tmp_path, parents(tmp_path, base))
    expected = distil_alone(base, job, first_adapter(base, job))
    events = run(base, {0: attach(*three_jobs(tmp_path, steps=9)), 3: attach(job)}, world_size)
    assert losses(events, "student") == pytest.approx(expected.losses, rel=bound)
    assert distance(adapters(events)["student"].factors, expected.factors) < bound


@pytest.mark.parametrize("world_size", [1, 2])
def test_distillation_beside_any_neighbours_is_bit_identical_to_alone(tmp_path, world_size):
    base = test_base(tmp_path)
    teachers = parents(tmp_path, base)
    alone = adapters(run(base, {0: attach(student(tmp_path, teachers))}, world_size))
    beside = [student(tmp_path, teachers, name) for name in ("again", "third")]
    beside[1] = replace(beside[1], distill=replace(beside[1].distill, temperature=1.0, labels=0.0))
    script = {0: attach(*three_jobs(tmp_path, steps=30), beside[1]), 2: attach(beside[0])}
    together = adapters(run(replace(base, tokens_per_tick=900, chunk_tokens=4096), script, world_size))
    assert_same_bits(together["again"].factors, alone["student"].factors)


def test_distillation_leaves_its_neighbours_bit_identical(tmp_path):
    base = test_base(tmp_path)
    jobs = three_jobs(tmp_path, steps=12)
    plain = adapters(run(base, {0: attach(*jobs)}))
    moved = elsewhere(jobs, "beside")
    found = adapters(run(base, {0: attach(student(tmp_path, parents(tmp_path, base)), *moved)}))
    for job in jobs:
        assert_same_bits(found[job.job].factors, plain[job.job].factors)


def test_distillation_resumed_is_bit_identical_to_never_interrupted(tmp_path):
    base = test_base(tmp_path, tokens_per_tick=500, chunk_tokens=4096)
    teachers = parents(tmp_path, base)
    start = start_of(tmp_path, teachers)
    whole = adapters(run(base, {0: attach(student(tmp_path, teachers, start=start))}))
    job = student(tmp_path, teachers, "cut", start=start)
    job = replace(job, adapter=job.adapter, training=replace(job.training, saves_per_epoch=5))
    events = run(base, {0: attach(job), 9: [Detach("cut", 1)], 11: attach(replace(job, attempt=2))})
    assert max(event.step for event in events if isinstance(event, Attached)) > 0
    assert_same_bits(adapters(events)["cut"].factors, whole["student"].factors)


def start_of(folder: Path, teachers) -> str:
    """The parents' sum, cut to rank 6."""
    fused, _ = fuse([read_adapter(Path(t.adapter_dir)) for t in teachers], [0.5, 0.5], "svd", 6)
    with publish_folder(folder / "start", {}) as scratch:
        write_adapter(fused, scratch)
    return str(folder / "start")


def test_distillation_starts_as_the_adapter_it_is_given(tmp_path):
    base = test_base(tmp_path)
    teachers = parents(tmp_path, base)
    job = student(tmp_path, teachers, start=start_of(tmp_path, teachers))
    host = Host.load(base, Ranks())
    host.apply(Attach(job))
    found = host.base.slots.export(host.residents["student"].slot, job.adapter, "")
    given = read_adapter(tmp_path / "start")
    for name, (a, b) in found.factors.items():
        expected = 0.0 if name not in given.factors else given.factors[name][1] @ given.factors[name][0]
        assert torch.allclose(found.scaling(name) * b @ a, torch.as_tensor(expected), atol=1e-6), name
    assert adapter_config(found)["r"] == 8


def test_distillation_from_an_adapter_of_a_higher_rank_is_refused(tmp_path):
    base = test_base(tmp_path)
    teachers = parents(tmp_path, base)
    job = student(tmp_path, teachers, start=start_of(tmp_path, teachers))
    host = Host.load(base, Ranks())
    (stopped,) = host.apply(Attach(replace(job, adapter=replace(job.adapter, r=5))))
    assert isinstance(stopped, JobStopped)
    assert "rank 6 does not fit" in stopped.message
    assert not host.base.slots._slots


def test_distillation_by_labels_alone_reads_no_teacher_and_is_training_on_all_rows(tmp_path):
    base = test_base(tmp_path)
    teachers = parents(tmp_path, base)
    job = student(tmp_path, [replace(t, adapter_dir="") for t in teachers], labels=1.0)
    events = run(base, {0: attach(job)})
    expected = distil_alone(base, student(tmp_path, teachers, labels=1.0), first_adapter(base, job))
    assert losses(events, "student") == pytest.approx(expected.losses, rel=1e-5)
    assert distance(adapters(events)["student"].factors, expected.factors) < 1e-5


def test_distillation_counts_what_its_teachers_read(tmp_path):
    base = test_base(tmp_path)
    teachers = parents(tmp_path, base)
    taught = run(base, {0: attach(student(tmp_path, teachers))})
    plain = run(base, {0: attach(student(tmp_path, teachers, "plain", labels=1.0))})
    for one, other in zip(steps(taught), steps(plain), strict=True):
        assert (one.tokens, one.padded_tokens) == (2 * other.tokens, 2 * other.padded_tokens)


def steps(events):
    found = [event for event in events if isinstance(event, StepDone)]
    assert len(found) == STEPS
    return found


def test_distillation_counts_its_teachers_in_the_memory_it_takes(tmp_path):
    base = test_base(tmp_path)
    job = student(tmp_path, parents(tmp_path, base))
    host = Host.load(base, Ranks())
    host.apply(Attach(job))
    resident = host.residents["student"]
    own = resident.optimizer.slot.weights.numel()
    frozen = sum(host.base.slots[slot].weights.numel() for slot in resident.teachers)
    assert own + frozen / 2 <= host.adapter_parameters <= own + frozen
    host.apply(Detach("student", 1))
    assert not host.base.slots._slots


def test_distillation_validates_on_every_teachers_rows_by_weight(tmp_path):
    base = test_base(tmp_path)
    teachers = [replace(teacher, validation=teacher.train) for teacher in parents(tmp_path, base)]
    found = []
    for name, kept in (("both", teachers), ("left", teachers[:1]), ("right", teachers[1:])):
        host = Host.load(base, Ranks())
        host.apply(Attach(student(tmp_path, kept, name)))
        found.append(host.training.validate(host.residents[name]))
    both, left, right = found
    assert both == pytest.approx((left + 2 * right) / 3, rel=1e-6)


def test_distillation_of_a_poisoned_student_leaves_the_neighbours_bit_identical(tmp_path):
    base = base_with_a_poisonous_byte(tmp_path)
    bad, *healthy = three_jobs(tmp_path, steps=10)
    teachers = parents(tmp_path, base)
    clean = student(tmp_path, [replace(teachers[0], train=bad.train), teachers[1]])
    dirty = student(tmp_path, [replace(teachers[0], train=poisoned(bad).train), teachers[1]], "dirty")
    expected = adapters(run(base, {0: attach(clean, *healthy)}))
    events = run(base, {0: attach(dirty, *elsewhere(healthy, "dirty"))})
    assert [(e.job, e.code) for e in events if isinstance(e, JobStopped)] == [("dirty", "diverged")]
    for job in healthy:
        assert_same_bits(adapters(events)[job.job].factors, expected[job.job].factors)


def test_distillation_keeps_the_ranks_in_lock_step(tmp_path):
    base = test_base(tmp_path)
    job = student(tmp_path, [replace(t, validation=t.train) for t in parents(tmp_path, base)])
    jobs = [*three_jobs(tmp_path, steps=6), job]
    traces = two_ranks(traces_of, base, jobs)
    assert set(traces[4:]) == {"COMPLETE"}


def traces_of(ranks, base, jobs):
    """State of DeepSpeed's module trace after every tick, the same on both ranks."""
    host = Host.load(base, ranks)
    for command in attach(*jobs):
        host.apply(command)
    found = []
    while host.busy:
        host.tick()
        found.append(host.base.trace)
    assert ranks.gather(json.dumps(found)) == [json.dumps(found)] * 2
    return found


def test_distillation_events_have_no_other_form_than_a_plain_jobs(tmp_path):
    base = test_base(tmp_path)
    job = student(tmp_path, [replace(t, validation=t.train) for t in parents(tmp_path, base)])
    events = run(base, {0: attach(job)})
    assert any(isinstance(event, Validated) for event in events)
    attached = next(event for event in events if isinstance(event, Attached))
    assert (attached.num_steps, attached.train_rows) == (STEPS, 80)
