"""Dropout masks depend on (job seed, step, sample, module) alone, never on neighbours, ticks or ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.fleet import fleet
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
from tests.numerics.masks import Masks
from tests.numerics.reference import train_alone
from tests.numerics.slots import adapted, factors, put
from workers.dropout import DropoutKey
from workers.lora import LoraLinear, Segment
from workers.types import AdapterSpec

P = 0.3
KEYS = (DropoutKey(1, 2, 3, tokens=20), DropoutKey(1, 2, 7, tokens=32), DropoutKey(1, 2, 5, tokens=9))


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_dropout_masks_of_a_row_are_the_same_bits_wherever_it_lies(tmp_path, module):
    masks = Masks(test_base(tmp_path), P)
    together = masks.of(module, KEYS, length=32)
    for row, key in enumerate(KEYS):
        alone = masks.of(module, [key], length=32)[0]
        longer = masks.of(module, [KEYS[1], key], length=64, before=3)[1]
        assert torch.equal(alone, together[row])
        assert torch.equal(longer[: key.tokens], together[row, : key.tokens])
        assert torch.equal(longer[key.tokens :], torch.ones_like(longer[key.tokens :]))


def test_dropout_one_rank_is_bit_identical_to_peft_with_the_same_masks(tmp_path):
    """So the base's product sees x itself, and the adapter's alone x dropped out."""
    base = test_base(tmp_path)
    jobs = [
        replace(job, training=replace(job.training, num_epochs=None, max_steps=12))
        for job in fleet(tmp_path, same_length=True, dropout=P)
    ]
    found = adapters(run(base, {0: attach(*jobs[:2]), 5: attach(*jobs[2:])}))
    masks = Masks(base, P)
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job), masks=masks)
        assert_same_bits(found[job.job].factors, alone.factors, job.job)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_dropout_split_over_ticks_and_ranks_agrees_with_peft_with_the_same_masks(
    tmp_path, dtype, bound, world_size
):
    base = test_base(tmp_path, dtype=dtype, tokens_per_tick=800)
    jobs = [
        replace(job, adapter=replace(job.adapter, lora_dropout=P)) for job in three_jobs(tmp_path, steps=12)
    ]
    found = adapters(run(base, {0: attach(*jobs)}, world_size))
    masks = Masks(base, P)
    for job in jobs:
        alone = train_alone(base, job, first_adapter(base, job), masks=masks)
        assert distance(found[job.job].factors, alone.factors) < bound, job.job


def set_to_identity(slots):
    for a, b in factors(slots, 0):
        a.copy_(torch.eye(*a.shape))
        b.copy_(torch.eye(*b.shape))


def test_dropout_keeps_its_rate_and_scales_what_is_kept():
    model = torch.nn.Sequential(torch.nn.Linear(400, 400, bias=False)).requires_grad_(False)
    torch.nn.init.zeros_(model[0].weight)
    lora = adapted(model)
    put(lora.slots, 0, AdapterSpec(r=400, lora_alpha=400, lora_dropout=0.25))
    assert isinstance(model[0], LoraLinear)
    set_to_identity(lora.slots)
    key = DropoutKey(seed=1, step=2, sample=3, tokens=250)
    with lora.rows([Segment(0, 0, 1, (key,))]):
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
    lora = adapted(model)
    put(lora.slots, 0, AdapterSpec(r=64, lora_alpha=64, lora_dropout=0.5))
    set_to_identity(lora.slots)
    seen = set()
    for layer in model:
        for step in (0, 1):
            for sample in (0, 1):
                key = DropoutKey(0, step, sample, tokens=16)
                with lora.rows([Segment(0, 0, 1, (key,))]), torch.no_grad():
                    update = layer(torch.ones(1, 16, 64))
                seen.add(tuple((update == 0).flatten().tolist()))
    assert len(seen) == 8
