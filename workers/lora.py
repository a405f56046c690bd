"""Many adapters on one frozen model: every linear layer adds, for each job's rows, that job's own update.

    y[rows of job j] += scaling_j * B_j @ A_j @ dropout_j(x[rows of job j])

(LoRA, arXiv 2106.09685 equation 3; rsLoRA scaling, arXiv 2312.03732.) Jobs never share a row, so nothing one
job computes can reach another. The factors live outside the module tree, so ZeRO-3 neither partitions nor
sees them. Shapes: R rows of T tokens; D features in, O features out; r rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.adapter import Adapter, lora_scaling, short_names
from workers.types import AdapterSpec, BadInput


@dataclass(frozen=True)
class DropoutKey:
    """What a row's dropout masks depend on: nothing but the job's seed, its step, and the sample."""

    seed: int
    step: int
    sample: int
    tokens: int
    """Real tokens of the row; padding is never dropped, so masks do not depend on it."""


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the micro-batch belong to the adapter in `slot`."""

    slot: int
    start: int
    stop: int
    dropout: tuple[DropoutKey, ...] = ()
    """One key a row; empty when nothing is dropped."""


@dataclass
class Factors:
    """One job's pair for one linear layer: A [r, D], B [O, r]."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float


class Slots:
    """The adapters resident on a model, and which rows of the current micro-batch each one has."""

    def __init__(self, model: nn.Module, excluded: Sequence[nn.Module] = ()) -> None:
        self.layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and not any(layer is other for other in excluded)
        }
        self._factors: dict[int, dict[str, Factors]] = {}
        self._segments: tuple[Segment, ...] = ()

    # -- adapters in and out of slots ------------------------------------------------------------------

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

    def create(self, slot: int, spec: AdapterSpec, seed: int) -> list[nn.Parameter]:
        """Put a fresh adapter in `slot`: A uniform as PEFT draws it, B zero. Returns its parameters."""
        factors = {}
        scaling = lora_scaling(spec.lora_alpha, spec.r, spec.use_rslora)
        for name in self.matching(spec.target_modules):
            layer = self.layers[name]
            generator = torch.Generator().manual_seed(_seed_of(seed, name))
            bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform with a = sqrt(5)
            a = torch.empty(spec.r, layer.in_features).uniform_(-bound, bound, generator=generator)
            b = torch.zeros(layer.out_features, spec.r)
            factors[name] = self._pair(layer, a, b, scaling, spec.lora_dropout)
        self._factors[slot] = factors
        return self.parameters(slot)

    def load(self, slot: int, adapter: Adapter) -> None:
        """Put a saved adapter in `slot`, without dropout. Raises BadInput if it does not fit the base."""
        factors = {}
        for name, (a, b) in adapter.factors.items():
            layer = self.layers.get(name)
            if layer is None or (layer.in_features, layer.out_features) != (a.shape[1], b.shape[0]):
                raise BadInput(f"the adapter's module '{name}' does not fit this base; train it on this one")
            factors[name] = self._pair(layer, a, b, adapter.scaling(name))
        self._factors[slot] = factors

    def overwrite(self, slot: int, adapter: Adapter) -> None:
        """Copy a checkpoint's values into the parameters that `slot` already has."""
        with torch.no_grad():
            for name, (a, b) in adapter.factors.items():
                self._factors[slot][name].a.copy_(a)
                self._factors[slot][name].b.copy_(b)

    def parameters(self, slot: int) -> list[nn.Parameter]:
        return [parameter for pair in self._factors[slot].values() for parameter in (pair.a, pair.b)]

    def export(self, slot: int, spec: AdapterSpec, base_model: str) -> Adapter:
        """The adapter in `slot`, as it would be saved."""
        factors = {name: (pair.a.detach(), pair.b.detach()) for name, pair in self._factors[slot].items()}
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
        self._factors.pop(slot, None)

    @staticmethod
    def _pair(layer: nn.Linear, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Factors:
        # Adapters train in float32 on a half-precision base, as PEFT's do; in float64 on a float64 base.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        device = layer.weight.device
        a, b = a.to(device, dtype).clone(), b.to(device, dtype).clone()
        return Factors(nn.Parameter(a), nn.Parameter(b), scaling, dropout)

    # -- one micro-batch -------------------------------------------------------------------------------

    @contextmanager
    def rows(self, segments: Sequence[Segment]) -> Generator[None]:
        """Within the block, forward passes apply these segments' adapters; other rows see the base."""
        self._segments = tuple(segments)
        try:
            yield
        finally:
            self._segments = ()

    def add(self, name: str, index: int, x_RTD: Tensor, y_RTO: Tensor) -> Tensor:
        """y plus every present adapter's update for its own rows."""
        active = [
            (segment, pair)
            for segment in self._segments
            if (pair := self._factors[segment.slot].get(name)) is not None
        ]
        if not active:
            return y_RTO
        factors = [tensor for _, pair in active for tensor in (pair.a, pair.b)]
        updates = [Update(s.start, s.stop, p.scaling, _mask(s, p, index, x_RTD)) for s, p in active]
        return AddUpdates.apply(x_RTD, y_RTO, updates, *factors)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Update:
    """One segment's part of a layer call. `mask_STD` is dropout's multiplier, None without dropout."""

    start: int
    stop: int
    scaling: float
    mask_STD: Tensor | None

    def input(self, x_RTD: Tensor, dtype: torch.dtype) -> Tensor:
        """The segment's tokens as a matrix [rows * T, D], dropped out and in the adapter's dtype."""
        x_STD = x_RTD[self.start : self.stop].to(dtype)
        if self.mask_STD is not None:
            x_STD = x_STD * self.mask_STD
        return x_STD.flatten(0, 1)


class AddUpdates(torch.autograd.Function):
    """out = y; out[segment] += scaling * (x[segment] A^T) B^T. The operations and their order are PEFT's.

    x [R, T, D], y [R, T, O]; `factors` alternates A [r, D] and B [O, r], one pair for each update.
    """

    @staticmethod
    def forward(ctx, x_RTD: Tensor, y_RTO: Tensor, updates: list[Update], *factors: Tensor) -> Tensor:  # noqa: ANN001
        out_RTO = y_RTO.clone()
        downs = []
        for update, a, b in zip(updates, factors[::2], factors[1::2], strict=True):
            down = update.input(x_RTD, a.dtype) @ a.t()
            up = (down @ b.t()) * update.scaling
            out_RTO[update.start : update.stop] += up.view(-1, *y_RTO.shape[1:])
            downs.append(down)
        ctx.updates = updates
        ctx.save_for_backward(x_RTD, *factors, *downs)
        return out_RTO

    @staticmethod
    def backward(ctx, grad_RTO: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        updates: list[Update] = ctx.updates
        x_RTD, *rest = ctx.saved_tensors
        factors, downs = rest[: 2 * len(updates)], rest[2 * len(updates) :]
        dx_RTD = torch.zeros_like(x_RTD) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for update, a, b, down in zip(updates, factors[::2], factors[1::2], downs, strict=True):
            d_up = grad_RTO[update.start : update.stop].flatten(0, 1).to(a.dtype) * update.scaling
            d_down = d_up @ b
            grads += [d_down.t() @ update.input(x_RTD, a.dtype), d_up.t() @ down]
            if dx_RTD is not None:
                d_input = (d_down @ a).view(-1, *x_RTD.shape[1:])
                if update.mask_STD is not None:
                    d_input = d_input * update.mask_STD
                dx_RTD[update.start : update.stop] = d_input
        return (dx_RTD, grad_RTO, None, *grads)


class LoraLinear(nn.Module):
    """A frozen linear layer and the adapters of whatever jobs are resident. Always called, never replaced."""

    def __init__(self, base_layer: nn.Linear, name: str, index: int, slots: Slots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._where = (name, index, slots)  # a tuple, so that nn.Module does not look for parameters in it

    def forward(self, x_RTD: Tensor) -> Tensor:
        name, index, slots = self._where
        return slots.add(name, index, x_RTD, self.base_layer(x_RTD))


def install(model: nn.Module, excluded: Sequence[nn.Module] = ()) -> Slots:
    """Wrap every linear layer of `model` once, before DeepSpeed hooks it, but for the `excluded`."""
    slots = Slots(model, excluded)
    for index, (name, layer) in enumerate(slots.layers.items()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layer, name, index, slots))
    return slots


def _mask(segment: Segment, pair: Factors, index: int, x_RTD: Tensor) -> Tensor | None:
    """Dropout's multiplier for the segment's rows: 0 where dropped, 1/(1-p) where kept, 1 on padding."""
    if not segment.dropout or pair.dropout == 0:
        return None
    mask_STD = torch.ones(segment.stop - segment.start, *x_RTD.shape[1:], dtype=pair.a.dtype)
    for row, key in enumerate(segment.dropout):
        generator = torch.Generator().manual_seed(_seed_of(key.seed, key.step, key.sample, index))
        drawn = torch.rand(key.tokens, x_RTD.shape[2], generator=generator)
        mask_STD[row, : key.tokens] = (drawn >= pair.dropout).to(mask_STD.dtype) / (1 - pair.dropout)
    return mask_STD.to(x_RTD.device)


def _seed_of(*key: object) -> int:
    """A 63-bit seed that depends on the key alone, on every machine and Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
