"""Adapters beside layers that multiply by themselves, against those that multiply for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers import beside, lora
from workers.lora import Adapters, Segment
from workers.slots import Slots
from workers.types import AdapterSpec

SPECS = [AdapterSpec(r=4, lora_alpha=3), AdapterSpec(r=2, lora_alpha=8, target_modules=("1",))]


class Packed(torch.nn.Linear):
    """Stands for a 4-bit layer: its weight is packed bytes, unpacked for each product."""

    def pack(self):
        self.shown = self.weight.shape
        self.weight = torch.nn.Parameter(
            self.weight.detach().contiguous().view(torch.uint8).flatten(), requires_grad=False
        )
        return self

    def forward(self, input):
        return F.linear(input, self.weight.data.view(torch.float64).view(self.shown), self.bias)


def one_pass(kind, install, arithmetic, input_grad):
    torch.manual_seed(0)
    layers = [kind(12, 20), kind(20, 8)]
    model = torch.nn.Sequential(*layers).double().requires_grad_(False)
    slots = Slots(lora.linear_layers(model), torch.float64, torch.device("cpu"), arithmetic)
    if kind is Packed:
        for layer in layers:
            layer.pack()
    adapters = Adapters(slots)
    install(adapters)
    for slot, spec in enumerate(SPECS):
        for _, b in slots.create(slot, spec, seed=slot).values().values():
            b.normal_()
    x = torch.randn(5, 3, 12, dtype=torch.float64, requires_grad=input_grad)
    with adapters.rows([Segment(0, 0, 2), Segment(1, 3, 5)]):
        y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *([x.grad] if input_grad else []), *(slots[slot].weights.grad for slot in (0, 1))]


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("arithmetic", ["exact", "fused"])
def test_beside_packed_weights_agrees_with_whole_ones(arithmetic, input_grad):
    expected = one_pass(torch.nn.Linear, lora.install, arithmetic, input_grad)
    found = one_pass(Packed, beside.install, arithmetic, input_grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert float(theirs.norm()) > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-12
