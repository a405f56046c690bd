"""How tests reach into a base's slots: the one place that knows how a host keeps weights and gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.lora import Adapters, install, linear_layers
from workers.slots import Slots
from workers.types import AdapterSpec


def adapted(model: nn.Module, *excluded: nn.Module) -> Adapters:
    """`model`'s linear layers made to consult the slots of what is returned."""
    dtype = next(model.parameters()).dtype
    adapters = Adapters(Slots(linear_layers(model, excluded), dtype, torch.device("cpu"), "exact"))
    install(adapters)
    return adapters


def put(slots: Slots, slot: int, spec: AdapterSpec, seed: int = 0) -> None:
    """A fresh adapter."""
    slots.create(slot, spec, seed)


def factors(slots: Slots, slot: int) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of every module, as the host computes with them: write into them under `torch.no_grad`."""
    return list(slots[slot].values().values())


def gradients(slots: Slots, slot: int) -> list[Tensor]:
    """A copy of every factor's gradient so far; zeros where none has come."""
    return [gradient.clone() for gradient in slots[slot].grads]


def clear_gradients(slots: Slots, slot: int) -> None:
    for gradient in slots[slot].grads:
        gradient.zero_()
