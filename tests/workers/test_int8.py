"""Weights in int8: how far they move, and that they move once."""

from __future__ import annotations

import pytest
import torch

from workers.int8 import GROUP, Int8, quantized, restored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_int8_moves_no_weight_by_more_than_half_a_scale(dtype):
    weights = torch.randn(24, 2 * GROUP, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, scales = quantized(weights)
    assert (values.dtype, values.shape, scales.numel()) == (torch.int8, weights.shape, 48)
    moved = (restored(values, scales) - weights).view(-1, GROUP).abs().amax(dim=1)
    assert bool((moved <= scales * 0.5001).all())


def test_int8_of_restored_weights_is_the_same_again():
    weights = torch.randn(8, GROUP, generator=torch.Generator().manual_seed(2))
    once = restored(*quantized(weights))
    assert torch.equal(restored(*quantized(once)), once)


def test_int8_group_of_zeros_stays_zero():
    assert torch.equal(restored(*quantized(torch.zeros(GROUP))), torch.zeros(GROUP))


def test_int8_gives_back_the_dtype_that_is_asked_for():
    values, scales = quantized(torch.ones(GROUP, dtype=torch.bfloat16))
    assert scales.dtype == torch.float32
    assert Int8().dequantize(values, scales, torch.bfloat16).dtype == torch.bfloat16
