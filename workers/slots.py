"""The adapters resident on a base: a slot is one flat buffer of factors and one of gradients.

The factors of a layer are views into the buffers, so the optimizer, the norm and the reduction over ranks
work on one tensor a job. They live outside the module tree: ZeRO-3 neither partitions nor sees them.
Shapes: D features in, O features out; r rank; n numbers of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from workers.adapter import Adapter, short_names
from workers.adapter_config import lora_scaling
from workers.arena import Arenas
from workers.dropout import seed_of
from workers.types import AdapterSpec, BadInput

Arithmetic = Literal["exact", "fused"]
"""exact: PEFT's precision, operations and order. fused: the base's precision, fewest passes over memory."""


@dataclass
class Factors:
    """One job's pair for one linear layer: A [r, D], B [O, r], and where their gradients are summed."""

    a: Tensor
    b: Tensor
    a_grad: Tensor
    b_grad: Tensor
    scaling: float
    dropout: float

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def scaling_is_exact(self) -> bool:
        """A power of two: multiplying by it rounds nothing, so it may be applied wherever it is cheapest."""
        return math.frexp(self.scaling)[0] == 0.5


class Slot:
    """One adapter. `weights` [n] is what is trained; `weights.grad` is always there."""

    def __init__(
        self,
        values: Mapping[str, tuple[Tensor, Tensor]],
        scaling: Mapping[str, float],
        dropout: float,
        products: torch.dtype,
        fused: bool,
        arenas: Arenas,
    ) -> None:
        """`values[layer]` are A and B as they start. Layers multiply by copies in `products`."""
        self.fused = fused
        self._shapes = [tensor.shape for pair in values.values() for tensor in pair]
        start = self.inward(torch.cat([tensor.flatten() for pair in values.values() for tensor in pair]))
        self.place = arenas.take("weights", len(start), start.dtype)
        gradient = arenas.take("gradients", len(start), start.dtype)
        self._places = [self.place, gradient]
        flat = self.place.values.copy_(start)
        self.weights = nn.Parameter(flat)
        self.weights.grad = gradient.values
        self._read = flat
        if products != flat.dtype:
            self._places.append(arenas.take("read", len(start), products))
            self._read = self._places[-1].values.copy_(flat)
        self.grads = self._views(self.weights.grad)
        self._weights = dict(zip(values, _pairs(self._views(flat)), strict=True))
        pairs = zip(values, _pairs(self._views(self._read)), _pairs(self.grads), strict=True)
        self.factors = {
            layer: Factors(a, b, a_grad, b_grad, scaling[layer], dropout)
            for layer, (a, b), (a_grad, b_grad) in pairs
        }

    def _views(self, x_n: Tensor) -> list[Tensor]:
        """A, B, A, B, ... in numbers as they lie here: fused products read B transposed, so it lies so."""
        lying = [
            shape[::-1] if self.fused and number % 2 else shape for number, shape in enumerate(self._shapes)
        ]
        views = _views(x_n, lying)
        return [view.t() if self.fused and number % 2 else view for number, view in enumerate(views)]

    def outward(self, x_n: Tensor) -> Tensor:
        """Numbers of this slot, one a weight, in a checkpoint's order: A and B of each layer, by rows."""
        return torch.cat([view.flatten() for view in self._views(x_n)]) if self.fused else x_n

    def inward(self, x_n: Tensor) -> Tensor:
        """What `outward` gave, as it lies here."""
        if not self.fused:
            return x_n
        views = _views(x_n, self._shapes)
        return torch.cat([(v.t() if number % 2 else v).flatten() for number, v in enumerate(views)])

    def values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A, B), views in the precision they are trained in."""
        return self._weights

    def give_back(self) -> None:
        """Let others have its memory: nothing may use the slot any more."""
        for place in self._places:
            place.give_back()

    def refresh(self) -> None:
        """Let the products see what the optimizer, or a checkpoint, has written."""
        if self._read.dtype != self.weights.dtype:
            self._read.copy_(self.weights.detach())


class Slots:
    """Every adapter on a base, by slot number, and the linear layers they may sit on."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        dtype: torch.dtype,
        device: torch.device,
        arithmetic: Arithmetic,
    ) -> None:
        """`dtype` and `device` are the base's."""
        self.layers = dict(layers)
        # Adapters train in float32 on a half-precision base, as PEFT's do; in float64 on a float64 base.
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._device = device
        self.arithmetic: Arithmetic = arithmetic
        self._products = dtype if arithmetic == "fused" else self._dtype
        self.arenas = Arenas(device)
        self._slots: dict[int, Slot] = {}
        self.version = 0
        """Changes whenever a slot is filled or emptied."""

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def matching(self, target_modules: str | Sequence[str]) -> list[str]:
        """Layers that `target_modules` selects, by PEFT's rule: a name's whole or dotted end matches.

        Raises BadInput when an entry selects nothing.
        """
        if target_modules == "all-linear":
            return list(self.layers)
        found: set[str] = set()
        for target in target_modules:
            hits = {name for name in self.layers if name == target or name.endswith(f".{target}")}
            if not hits:
                known = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
                raise BadInput(
                    f"lora_target_modules: '{target}' matches no linear layer of the base; "
                    f"it has {', '.join(known)}"
                )
            found |= hits
        return [name for name in self.layers if name in found]

    def create(self, slot: int, spec: AdapterSpec, seed: int) -> Slot:
        """Put a fresh adapter in `slot`: A uniform as PEFT draws it, B zero."""
        values = {}
        for name in self.matching(spec.target_modules):
            layer = self.layers[name]
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform with a = sqrt(5)
            a = torch.empty(spec.r, layer.in_features).uniform_(-bound, bound, generator=generator)
            values[name] = (a, torch.zeros(layer.out_features, spec.r))
        scaling = lora_scaling(spec.lora_alpha, spec.r, spec.use_rslora)
        return self._put(slot, values, dict.fromkeys(values, scaling), spec.lora_dropout)

    def load(self, slot: int, adapter: Adapter) -> None:
        """Put a saved adapter in `slot`, without dropout. Raises BadInput if it does not fit the base."""
        for name, (a, b) in adapter.factors.items():
            layer = self.layers.get(name)
            if layer is None or (layer.in_features, layer.out_features) != (a.shape[1], b.shape[0]):
                raise BadInput(f"the adapter's module '{name}' does not fit this base; train it on this one")
        self._put(slot, adapter.factors, {name: adapter.scaling(name) for name in adapter.factors}, 0.0)

    def overwrite(self, slot: int, adapter: Adapter) -> None:
        """Copy a checkpoint's values into the weights that `slot` already has."""
        into = self._slots[slot].values()
        for name, (a, b) in adapter.factors.items():
            into[name][0].copy_(a)
            into[name][1].copy_(b)
        self._slots[slot].refresh()

    def export(self, slot: int, spec: AdapterSpec, base_model: str) -> Adapter:
        """A copy of the adapter in `slot` in host memory, as it would be saved."""
        held = self._slots[slot].values()
        factors = {name: (_copy(a), _copy(b)) for name, (a, b) in held.items()}
        return Adapter(
            factors,
            spec.r,
            spec.lora_alpha,
            spec.use_rslora,
            spec.lora_dropout,
            base_model=base_model,
            target_modules=short_names(factors, self.layers),
        )

    def free(self, slot: int) -> None:
        """Empty `slot`; an empty one stays empty."""
        if held := self._slots.pop(slot, None):
            held.give_back()
        self.version += 1

    def _put(
        self,
        slot: int,
        values: Mapping[str, tuple[Tensor, Tensor]],
        scaling: Mapping[str, float],
        dropout: float,
    ) -> Slot:
        def placed(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype)

        moved = {name: (placed(a), placed(b)) for name, (a, b) in values.items()}
        self.free(slot)
        made = Slot(moved, scaling, dropout, self._products, self.arithmetic == "fused", self.arenas)
        self._slots[slot] = made
        return made


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _copy(x: Tensor) -> Tensor:
    """In host memory, contiguous."""
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
