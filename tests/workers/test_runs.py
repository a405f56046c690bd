"""Fused arithmetic, the GPU's, against exact arithmetic, the CPU's: the same adapters within the contract."""

from __future__ import annotations

import pytest
import torch

from workers.lora import Adapters, Segment, install, linear_layers
from workers.products import Grouped
from workers.runs import bucket
from workers.slots import Slots
from workers.types import AdapterSpec

SPECS = [
    AdapterSpec(r=8, lora_alpha=16),
    AdapterSpec(r=5, lora_alpha=3, use_rslora=True),
    AdapterSpec(r=8, lora_alpha=24, target_modules=("0",)),
    AdapterSpec(r=24, lora_alpha=8, lora_dropout=0.25),
    AdapterSpec(r=17, lora_alpha=8),
]
ROWS = [2, 1, 3, 2, 1]


def gradients(arithmetic, segments):
    """Every slot's gradient, and the input's, of one pass through two layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)).requires_grad_(False)
    slots = Slots(linear_layers(model), torch.float32, torch.device("cpu"), arithmetic)
    adapters = Adapters(slots)
    install(adapters)
    for slot, spec in enumerate(SPECS):
        values = slots.create(slot, spec, seed=slot).values()
        for _, b in values.values():
            b.copy_(torch.randn(b.shape))
    x = torch.randn(sum(ROWS) + 1, 16, 32, requires_grad=True)
    with adapters.rows(segments):
        y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = [slots[slot].outward(slots[slot].weights.grad) for slot in range(len(SPECS))]
    return y.detach(), x.grad, grads, adapters


def segments():
    ends = torch.tensor(ROWS).cumsum(0).tolist()
    return [Segment(slot, end - rows, end) for slot, (rows, end) in enumerate(zip(ROWS, ends, strict=True))]


def test_fused_agrees_with_exact():
    y, dx, grads, _ = gradients("exact", segments())
    fused_y, fused_dx, fused_grads, _ = gradients("fused", segments())
    for found, expected in zip([fused_y, fused_dx, *fused_grads], [y, dx, *grads], strict=True):
        assert float(expected.norm()) > 0
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_rows_of_nobody_see_the_base_alone():
    y, dx, _, adapters = gradients("exact", segments()[:1])
    base_y, base_dx, _, _ = gradients("exact", [])
    assert torch.equal(y[ROWS[0] :], base_y[ROWS[0] :])
    assert torch.equal(dx[ROWS[0] :], base_dx[ROWS[0] :])
    assert not torch.equal(y[: ROWS[0]], base_y[: ROWS[0]])
    assert adapters.runs("0", 0, torch.randn(2, 4, 32)) == []


def test_neighbours_of_one_bucket_share_a_product_and_no_rank_is_padded_to_the_largest():
    *_, adapters = gradients("fused", segments())
    with adapters.rows(segments()):
        runs = adapters.runs("0", 0, torch.randn(sum(ROWS) + 1, 16, 32))
    assert [len(run.factors) for run in runs] == [3, 2]
    assert [run.rank for run in runs] == [8, 32]
    assert all(isinstance(run.products, Grouped) for run in runs)


@pytest.mark.parametrize(("r", "taken_for"), [(1, 8), (8, 8), (9, 16), (24, 32), (64, 64)])
def test_buckets(r, taken_for):
    assert bucket(r) == taken_for
