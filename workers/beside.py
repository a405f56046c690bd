"""Adapters on layers that multiply by themselves: their weights lie packed, 4 bits each, and are no matrix.

`lora.LoraLinear` does a layer's product and its updates in one function and reads the weight for it. Here the
layer computes y = x W^T and its own part of dx as it would alone, and the updates are added to both. That
costs a copy of y more. Shapes: as in `workers.lora`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.lora import Adapters
from workers.runs import Kept, Run, new_dx


class AddRuns(torch.autograd.Function):
    """y plus every run's update; on the way back, the adapters' gradients and their part of dx."""

    @staticmethod
    def forward(ctx: Any, x_RTD: Tensor, y_RTO: Tensor, anchor: Tensor, runs: list[Run]) -> Tensor:  # noqa: ARG004
        out_RTO = y_RTO.clone()
        x_ND, out_NO = x_RTD.flatten(0, -2), out_RTO.view(-1, out_RTO.shape[-1])
        kept = [run.add_update(x_ND, out_NO) for run in runs]
        ctx.runs = runs
        ctx.save_for_backward(x_RTD, *(tensor for of_run in kept for tensor in of_run))
        return out_RTO

    @staticmethod
    def backward(ctx: Any, grad_RTO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RTD, *kept = ctx.saved_tensors
        x_ND, grad_NO = x_RTD.flatten(0, -2), grad_RTO.flatten(0, -2)
        dx_ND = new_dx(ctx.runs, x_ND) if ctx.needs_input_grad[0] else None
        for number, run in enumerate(ctx.runs):
            run.add_gradients(x_ND, grad_NO, Kept(*kept[3 * number : 3 * number + 3]), dx_ND)
        return (None if dx_ND is None else dx_ND.view_as(x_RTD), grad_RTO, None, None)


class Beside:
    """Put before a layer's own class: its forward, and the updates of whatever jobs are resident."""

    adapters: Adapters
    place: tuple[str, int]
    """The layer's name and number."""

    def forward(self, input: Tensor) -> Tensor:
        y_RTO: Tensor = super().forward(input)  # type: ignore[misc]
        runs = self.adapters.runs(*self.place, input)
        return AddRuns.apply(input, y_RTO, self.adapters.anchor, runs) if runs else y_RTO  # type: ignore[no-any-return]


def install(adapters: Adapters) -> None:
    """As `lora.install`, for layers of any class that takes x and gives x W^T."""
    for index, (name, layer) in enumerate(adapters.slots.layers.items()):
        own = type(layer)
        layer.__class__ = type(f"Lora{own.__name__}", (Beside, own), {})
        layer.adapters = adapters
        layer.place = (name, index)
