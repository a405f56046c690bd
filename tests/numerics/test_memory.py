"""The memory model on a real host: a slot's bytes exactly, and who is let in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.numerics.jobs import adapters, attach, drive, test_base, three_jobs
from workers.host import Host
from workers.ranks import Ranks
from workers.types import AdapterSpec, HostMeasured, JobStopped, MemoryModel, TrainingFinished


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
