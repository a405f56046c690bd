"""How tests reach into a base's slots: the one place that knows how a host keeps weights and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.lora import Slots
from workers.types import AdapterSpec


def put(slots: Slots, slot: int, spec: AdapterSpec, seed: int = 0) -> None:
    """A fresh adapter."""
    slots.create(slot, spec, seed)


def factors(slots: Slots, slot: int) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of every module, as the host computes with them: write into them under `torch.no_grad`."""
    parameters = slots.parameters(slot)
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def gradients(slots: Slots, slot: int) -> list[Tensor]:
    """A copy of every factor's gradient so far; zeros where none has come."""
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for parameter in slots.parameters(slot)
    ]


def clear_gradients(slots: Slots, slot: int) -> None:
    for parameter in slots.parameters(slot):
        parameter.grad = None
