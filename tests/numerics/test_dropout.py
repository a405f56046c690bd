"""Dropout masks depend on (job seed, step, sample, module) alone, never on neighbours, ticks or ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.numerics.jobs import adapters, attach, distance, run, test_base, three_jobs
from workers.dropout import DropoutKey
from workers.lora import Adapters, LoraLinear, Segment, install, linear_layers
from workers.slots import Slots
from workers.types import AdapterSpec


def with_dropout(jobs):
    return [replace(job, adapter=replace(job.adapter, lora_dropout=0.3)) for job in jobs]


def test_dropout_alone_and_with_neighbours_is_bit_identical(tmp_path):
    base = test_base(tmp_path, tokens_per_tick=800)
    jobs = with_dropout(three_jobs(tmp_path, steps=8))
    together = adapters(run(base, {0: attach(*jobs)}))
    for job in jobs:
        alone = replace(job, checkpoint_dir=job.checkpoint_dir + "-alone")
        found = adapters(run(base, {0: attach(alone)}))[job.job]
        for name, pair in together[job.job].factors.items():
            assert torch.equal(found.factors[name][0], pair[0])
            assert torch.equal(found.factors[name][1], pair[1])


def test_dropout_split_over_ranks_draws_the_same_masks(tmp_path):
    base = test_base(tmp_path)
    jobs = with_dropout(three_jobs(tmp_path, steps=20))
    one = adapters(run(base, {0: attach(*jobs)}))
    moved = [replace(job, checkpoint_dir=job.checkpoint_dir + "-two") for job in jobs]
    two = adapters(run(base, {0: attach(*moved)}, world_size=2))
    for job in jobs:
        assert distance(two[job.job].factors, one[job.job].factors) < 1e-5


def adapted(model, spec):
    """`model` with one fresh adapter in slot 0, and what its layers consult."""
    slots = Slots(linear_layers(model), torch.float32, torch.device("cpu"), "exact")
    adapters = Adapters(slots)
    install(adapters)
    slots.create(0, spec, seed=0)
    return adapters


def set_to_identity(slot):
    for a, b in slot.values().values():
        a.copy_(torch.eye(*a.shape))
        b.copy_(torch.eye(*b.shape))


def test_dropout_keeps_its_rate_and_scales_what_is_kept():
    model = torch.nn.Sequential(torch.nn.Linear(400, 400, bias=False)).requires_grad_(False)
    torch.nn.init.zeros_(model[0].weight)
    adapters = adapted(model, AdapterSpec(r=400, lora_alpha=400, lora_dropout=0.25))
    assert isinstance(model[0], LoraLinear)
    set_to_identity(adapters.slots[0])
    key = DropoutKey(seed=1, step=2, sample=3, tokens=250)
    with adapters.rows([Segment(0, 0, 1, (key,))]):
        y = model(torch.ones(1, 300, 400))
    real, padding = y[0, :250], y[0, 250:]
    assert sorted(real.unique().tolist()) == [0.0, torch.tensor(1 / 0.75).item()]
    assert abs(float((real == 0).float().mean()) - 0.25) < 0.01
    assert torch.equal(padding, torch.ones_like(padding))


def test_dropout_masks_differ_between_modules_steps_and_samples():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).requires_grad_(False)
    for layer in model:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    adapters = adapted(model, AdapterSpec(r=64, lora_alpha=64, lora_dropout=0.5))
    set_to_identity(adapters.slots[0])
    seen = set()
    for layer in model:
        for step in (0, 1):
            for sample in (0, 1):
                key = DropoutKey(0, step, sample, tokens=16)
                with adapters.rows([Segment(0, 0, 1, (key,))]), torch.no_grad():
                    update = layer(torch.ones(1, 16, 64))
                seen.add(tuple((update == 0).flatten().tolist()))
    assert len(seen) == 8
