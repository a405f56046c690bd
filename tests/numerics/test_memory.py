"""The memory model on a real host: a slot's bytes exactly, and who is let in."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.numerics.jobs import adapters, attach, drive, test_base, three_jobs
from tests.numerics.pair import two_ranks
from workers.host import Host
from workers.ranks import Ranks
from workers.slots import Slot, Slots
from workers.types import (
    AdapterSpec,
    BaseSpec,
    HostMeasured,
    JobSpec,
    JobStopped,
    MemoryModel,
    TrainingFinished,
)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_memory_of_a_slot_is_its_parameters_gradients_and_moments_to_the_byte(tmp_path, dtype):
    host = Host.load(test_base(tmp_path, dtype=dtype), Ranks())
    job = three_jobs(tmp_path, steps=3)[0]
    host.apply(attach(job)[0])
    host.tick()
    resident = host.residents[job.job]
    assert resident.step > 0, "AdamW has its moments after the first step"
    moments = [value for name, value in resident.optimizer.tensors().items() if not name.endswith("step")]
    weights = resident.optimizer.slot.weights
    held = weights.nbytes + weights.grad.nbytes + sum(moment.nbytes for moment in moments)
    assert held == host.base.bytes_per_parameter * resident.adapter_parameters


def tight(host: Host, adapter_parameters: int) -> None:
    """Memory for adapters of so many parameters in all, beside passes of any size."""
    bytes_per_parameter = host.base.bytes_per_parameter
    limit = -(-adapter_parameters * bytes_per_parameter * 10 // 9)
    host.capacity.memory = MemoryModel(limit, 0, 0.0, bytes_per_parameter)


def test_memory_job_that_fits_alone_is_told_to_wait_and_the_resident_goes_on(tmp_path):
    host = Host.load(test_base(tmp_path), Ranks())
    first, second, _ = three_jobs(tmp_path, steps=3)
    attached = host.apply(attach(first)[0])
    tight(host, attached[0].trainable_parameters + 10)
    (stopped,) = host.apply(attach(second)[0])
    assert (stopped.job, stopped.code) == ("rslora", "waits_for_memory")
    assert "does not fit beside" in stopped.message
    events = drive(host, {0: []})
    assert adapters(events).keys() == {"wide"}
    events = drive(host, {0: attach(second)})
    assert [event.job for event in events if isinstance(event, TrainingFinished)] == ["rslora"]


def test_memory_job_that_never_fits_is_stopped_in_words(tmp_path):
    host = Host.load(test_base(tmp_path), Ranks())
    tight(host, 1000)
    job = replace(three_jobs(tmp_path)[0], adapter=AdapterSpec(r=64, lora_alpha=64))
    (stopped,) = host.apply(attach(job)[0])
    assert isinstance(stopped, JobStopped)
    assert stopped.code == "out_of_memory"
    assert "parameters does not fit in the memory of this host" in stopped.message
    assert not host.residents


class NoRoom:
    """No adapter can be put in a slot on the last rank: the allocator raises."""

    def __init__(self, slots: Slots, ranks: Ranks, error: Exception) -> None:
        self._slots, self._create = slots, slots.create
        self._error = error if ranks.rank == ranks.world_size - 1 else None

    def __enter__(self) -> None:
        def create(*arguments: Any) -> Slot:
            made = self._create(*arguments)
            if self._error:
                raise self._error
            return made

        self._slots.create = create  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._slots.create = self._create  # type: ignore[method-assign]


def run_without_room(ranks: Ranks, base: BaseSpec, jobs: list[JobSpec], error: Exception):
    """What is told of the first when it comes alone, of the second beside the first, and then."""
    host, (first, second) = Host.load(base, ranks), jobs
    with NoRoom(host.base.slots, ranks, error):
        alone = host.apply(attach(first)[0])
    left = ranks.gather(host.base.slots.arenas.bytes)
    host.apply(attach(replace(first, attempt=2))[0])
    with NoRoom(host.base.slots, ranks, error):
        beside = host.apply(attach(second)[0])
    return alone, left, beside, drive(host, {0: [], 1: attach(replace(second, attempt=2))})


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate")],
)
def test_memory_that_the_allocator_does_not_have_for_a_slot_is_no_bad_data(tmp_path, world_size, error):
    base, jobs = test_base(tmp_path), three_jobs(tmp_path, steps=3)[:2]
    if world_size == 1:
        told = run_without_room(Ranks(), base, jobs, error)
    else:
        told = two_ranks(run_without_room, base, jobs, error)
    (alone,), left, (beside,), events = told
    assert (alone.job, alone.code) == ("wide", "out_of_memory")
    assert left == [0] * world_size
    assert (beside.job, beside.code) == ("rslora", "waits_for_memory")
    assert "beside the host's other residents" in beside.message
    assert any(isinstance(event, HostMeasured) for event in events), "what is free is looked at again"
    assert adapters(events).keys() == {"wide", "rslora"}


def test_memory_is_reported_after_sixteen_ticks_and_then_at_doubled_times(tmp_path):
    host = Host.load(test_base(tmp_path, tokens_per_tick=1024), Ranks())
    reports = []
    for command in attach(*three_jobs(tmp_path, steps=40)):
        host.apply(command)
    for tick in range(1, 36):
        reports += [(tick, event) for event in host.tick() if isinstance(event, HostMeasured)]
    assert [tick for tick, _ in reports] == [16, 32]
    measured = reports[-1][1]
    parameters = host.adapter_parameters
    model = measured.memory
    assert not measured.calibrating
    assert model.bytes_per_parameter == 16
    assert 0 < model.fixed_bytes < model.limit_bytes
    assert measured.adapter_parameters > parameters
    assert measured.tokens_per_pass == 1024


def test_memory_of_a_slot_in_fused_arithmetic_counts_the_copy_that_the_products_read(tmp_path):
    host = Host.load(test_base(tmp_path, dtype="bfloat16", arithmetic="fused"), Ranks())
    assert host.base.bytes_per_parameter == 4 * 4 + 2
