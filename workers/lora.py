"""Adapters on a frozen model: every linear layer adds, for each job's rows, that job's own update.

Jobs never share a row, so nothing one job computes can reach another. A layer stays the module it was, with
its name and weight, and only its forward changes: Hugging Face's code and DeepSpeed's hooks see nothing new.
Shapes: R rows of T tokens, N = R * T; D features in, O features out.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.dropout import DropoutKey, draw_mask, draw_mask_end_to_end
from workers.products import Batched
from workers.runs import ExactRun, FusedRun, Kept, Run, join, new_dx
from workers.slots import Factors, Slots

ALL_ROWS = 1 << 40
"""Where a segment stops that has every row."""


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the micro-batch belong to the adapter in `slot`."""

    slot: int
    start: int
    stop: int
    dropout: tuple[DropoutKey, ...] = ()
    """One key a row; empty when nothing is dropped."""


class Adapters:
    """What the layers of a model consult: the slots, and whose rows the current micro-batch holds."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self._kind = ExactRun if slots.arithmetic == "exact" else FusedRun
        self._segments: tuple[Segment, ...] = ()
        self._ends: tuple[int, ...] = ()
        """Where rows that lie end to end begin and end, 0 first; empty where they have a dimension."""
        self._joined: dict[tuple[str, torch.Size], list[Run]] = {}
        """The runs of the latest segments, by layer and shape of its input: most ticks are like the last."""
        self._joined_for: tuple[int, tuple[Segment, ...], tuple[int, ...]] | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        """Gives a layer a backward pass where its input asks for no gradient."""

    @contextmanager
    def rows(self, segments: Sequence[Segment], ends: tuple[int, ...] = ()) -> Generator[None]:
        """Within the block, forward passes apply these segments' adapters; other rows see the base.

        With `ends` the rows lie end to end in one sequence: where each begins and ends, 0 first.
        """
        self._segments, self._ends = tuple(segments), ends
        now = (self.slots.version, self._segments, self._ends)
        if now != self._joined_for:
            self._joined, self._joined_for = {}, now
        try:
            yield
        finally:
            self._segments, self._ends = (), ()

    def free(self, slot: int) -> None:
        """Empty the slot, and let go of what read it."""
        self.slots.free(slot)
        self._joined, self._joined_for = {}, None

    def runs(self, name: str, index: int, x_RTD: Tensor) -> list[Run]:
        """The updates of one layer. `index` is the layer's number, for its dropout."""
        if not self._segments:
            return []
        key = (name, x_RTD.shape)
        if key in self._joined:
            return self._joined[key]
        runs = self._new_runs(name, index, x_RTD)
        if all(run.mask_ND is None for run in runs):
            self._joined[key] = runs
        return runs

    def _new_runs(self, name: str, index: int, x_RTD: Tensor) -> list[Run]:
        return join([run for segment in self._segments if (run := self._run(segment, name, index, x_RTD))])

    def _run(self, segment: Segment, name: str, index: int, x_RTD: Tensor) -> Run | None:
        factors = self.slots[segment.slot].factors.get(name)
        if factors is None:
            return None
        start, stop = self._tokens(segment, x_RTD)
        mask_ND = self._mask(segment, factors, index, x_RTD)
        return self._kind(start, stop, (factors,), Batched(1), factors.r, mask_ND)

    def _tokens(self, segment: Segment, x_RTD: Tensor) -> tuple[int, int]:
        if self._ends:
            return self._ends[segment.start], self._ends[segment.stop]
        tokens = x_RTD.shape[1:-1].numel()  # 1 in a layer that reads a vector a row, as a pooler does
        return segment.start * tokens, min(segment.stop, len(x_RTD)) * tokens

    def _mask(self, segment: Segment, factors: Factors, index: int, x_RTD: Tensor) -> Tensor | None:
        """Dropout's multiplier for the segment's tokens."""
        if not (segment.dropout and factors.dropout):
            return None
        dropout = (segment.dropout, factors.dropout, index)
        if self._ends:
            return draw_mask_end_to_end(*dropout, x_RTD.flatten(0, -2), factors.a.dtype)
        x_STD = x_RTD[segment.start : segment.stop]
        return draw_mask(*dropout, x_STD, factors.a.dtype).flatten(0, 1)


class LoraProduct(torch.autograd.Function):
    """y = x W^T + bias, then every run's update in place; on the way back likewise.

    `x` comes twice. In exact arithmetic the base's part of dx and the adapters' go to autograd separately, as
    two edges: it then sums a layer input's gradients in the order in which it does for PEFT's graph. In fused
    arithmetic both are one tensor. The adapters' own gradients are added to their slots' buffers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RTD: Tensor,
        base_x_RTD: Tensor,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        anchor: Tensor,  # noqa: ARG004
        runs: list[Run],
    ) -> Tensor:
        y_RTO = F.linear(base_x_RTD, weight_OD, bias_O)
        x_ND, y_NO = x_RTD.flatten(0, -2), y_RTO.view(-1, y_RTO.shape[-1])
        kept = [run.add_update(x_ND, y_NO) for run in runs]
        ctx.runs = runs
        ctx.save_for_backward(x_RTD, weight_OD, *(tensor for of_run in kept for tensor in of_run))
        return y_RTO

    @staticmethod
    def backward(ctx: Any, grad_RTO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RTD, weight_OD, *kept = ctx.saved_tensors
        runs: list[Run] = ctx.runs
        x_ND, grad_NO = x_RTD.flatten(0, -2), grad_RTO.flatten(0, -2)
        base_dx_ND = grad_NO @ weight_OD if ctx.needs_input_grad[1] else None
        dx_ND = base_dx_ND
        if base_dx_ND is not None and isinstance(runs[0], ExactRun):
            dx_ND = new_dx(runs, x_ND)
        for number, run in enumerate(runs):
            run.add_gradients(x_ND, grad_NO, Kept(*kept[3 * number : 3 * number + 3]), dx_ND)
        if base_dx_ND is None or dx_ND is None:
            return (None,) * 6
        base_dx_RTD = base_dx_ND.view_as(x_RTD)
        return (None if dx_ND is base_dx_ND else dx_ND.view_as(x_RTD), base_dx_RTD, None, None, None, None)


class LoraLinear(nn.Linear):
    """A frozen linear layer and the adapters of whatever jobs are resident."""

    adapters: Adapters
    place: tuple[str, int]
    """The layer's name and number."""

    def forward(self, input: Tensor) -> Tensor:
        runs = self.adapters.runs(*self.place, input)
        if not runs:
            return super().forward(input)
        return LoraProduct.apply(input, input, self.weight, self.bias, self.adapters.anchor, runs)  # type: ignore[no-any-return]


def linear_layers(model: nn.Module, excluded: Sequence[nn.Module] = ()) -> dict[str, nn.Linear]:
    """Every linear layer of `model` by name, but for the `excluded`."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not any(layer is other for other in excluded)
    }


def install(adapters: Adapters) -> None:
    """Let every layer of the slots consult `adapters`. Once, before DeepSpeed hooks the model."""
    for index, (name, layer) in enumerate(adapters.slots.layers.items()):
        layer.__class__ = LoraLinear
        layer.adapters = adapters
        layer.place = (name, index)
