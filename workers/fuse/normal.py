"""The normal form that every rule works on: scaling folded in, float64, one share per adapter and module.

Also the way back, from fused factors to an adapter whose run-time scaling is 1 in every module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.adapter import Adapter, check_finite
from workers.fuse.factors import Factors
from workers.types import BadInput


@dataclass(frozen=True)
class Module:
    """One module as the adapters see it. `shares[i]` is adapter i's whole delta, `weights[i]` its weight.

    An adapter without the module has a share of rank 0. The plain weighted sum, which most rules start from,
    is `stacked()`.
    """

    name: str
    shares: tuple[Factors, ...]
    weights: tuple[float, ...]
    grams: tuple[Tensor | None, ...] = ()
    """X_i^T X_i [N, N] of the inputs that adapter i was trained on; read only for rule `regmean`."""

    @property
    def rank(self) -> int:
        """Sum of the shares' ranks."""
        return sum(share.a.shape[0] for share in self.shares)

    @property
    def full_rank(self) -> int:
        """No matrix of this module's shape and shares has a higher rank."""
        return min(self.rank, self.shares[0].a.shape[1], self.shares[0].b.shape[0])

    def stacked(self) -> Factors:
        """sum_i w_i D_i as one product: A = [w_1 A_1; w_2 A_2; ...] and B = [B_1, B_2, ...]."""
        weighted = [weight * share.a for share, weight in zip(self.shares, self.weights, strict=True)]
        return Factors(torch.cat(weighted, dim=0), torch.cat([share.b for share in self.shares], dim=1))


def modules(adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str]) -> Iterator[Module]:
    """Every module any adapter has, in the order of names; made one at a time to bound memory.

    `names` say in errors which adapter is meant. Raises BadInput for NaN or Inf, and where shapes differ.
    """
    for adapter, name in zip(adapters, names, strict=True):
        check_finite(adapter, name)
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        shapes = {
            name: (adapter.factors[module][1].shape[0], adapter.factors[module][0].shape[1])
            for adapter, name in zip(adapters, names, strict=True)
            if module in adapter.factors
        }
        _require_one_shape(module, shapes)
        shape = next(iter(shapes.values()))
        yield Module(module, tuple(_share(adapter, module, shape) for adapter in adapters), tuple(weights))


def adapter_of(
    fused: Mapping[str, Factors], base_model: str, target_modules: tuple[str, ...], dtype: torch.dtype
) -> Adapter:
    """The adapter that adds `b @ a` to each module, rounded once to `dtype`.

    `r` is the largest rank and `lora_alpha` equals the rank in every module, so that the scaling is 1 both
    for PEFT, which reads `rank_pattern` and `alpha_pattern`, and for servers that read only `lora_alpha / r`.
    """
    fused = {name: _of_some_rank(factors) for name, factors in fused.items()}
    ranks = {name: factors.a.shape[0] for name, factors in fused.items()}
    r = max(ranks.values())
    return Adapter(
        factors={name: (factors.a.to(dtype), factors.b.to(dtype)) for name, factors in fused.items()},
        r=r,
        lora_alpha=r,
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != r},
        base_model=base_model,
        target_modules=target_modules,
    )


def _of_some_rank(factors: Factors) -> Factors:
    """A module that nothing is left of is written at rank 1, as zeros: no reader takes rank 0."""
    a, b = factors
    return factors if a.shape[0] else Factors(a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1))


def output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Float32, or float64 if an adapter is: half precision could not hold a scaling folded into it."""
    dtype = torch.float32
    for adapter in adapters:
        for a, _ in adapter.factors.values():
            dtype = torch.promote_types(dtype, a.dtype)
    return dtype


def common_targets(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Each adapter's `target_modules` select its own modules, so their union selects the fused one's."""
    return tuple(sorted({name for adapter in adapters for name in adapter.target_modules or adapter.factors}))


def _share(adapter: Adapter, module: str, shape: tuple[int, int]) -> Factors:
    if module not in adapter.factors:
        m, n = shape
        return Factors(torch.zeros(0, n, dtype=torch.float64), torch.zeros(m, 0, dtype=torch.float64))
    a, b = adapter.factors[module]
    return Factors(adapter.scaling(module) * a.double(), b.double())


def _require_one_shape(module: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise BadInput(
                f"{name}: module '{module}' is {shape[0]} x {shape[1]} but {shapes[first][0]} x "
                f"{shapes[first][1]} in {first}; fuse adapters of one base"
            )
