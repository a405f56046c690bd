"""The normal form that every rule works on: scaling folded in, float64, one share per adapter and module.

Also the way back, from fused factors to an adapter whose run-time scaling is 1 in every module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.adapter import Adapter, check_finite_factors
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
    shape: tuple[int, int]
    """M and N of the module itself, in whatever coordinates the shares are."""
    gram: Callable[[int], Tensor | None] = lambda _: None
    """X_i^T X_i [N, N] of the inputs that adapter i was trained on, if that is known; read when asked for."""

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


def modules(adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str]) -> Generator[Module]:
    """Every module any adapter has, in the order of names; made one at a time to bound memory.

    `names` say in errors which adapter is meant. Raises BadInput for NaN or Inf, and where shapes differ.
    """
    for module in module_names(adapters):
        shapes = {
            name: (adapter.described[module][1].shape[0], adapter.described[module][0].shape[1])
            for adapter, name in zip(adapters, names, strict=True)
            if module in adapter.factors
        }
        _require_one_shape(module, shapes)
        shape = next(iter(shapes.values()))
        shares = (_share(adapter, module, shape, name) for adapter, name in zip(adapters, names, strict=True))
        yield Module(module, tuple(shares), tuple(weights), shape)


def module_names(adapters: Sequence[Adapter]) -> list[str]:
    """Of every module that any adapter has, in order."""
    return sorted({module for adapter in adapters for module in adapter.factors})


def adapter_of(fused: Mapping[str, Factors], base_model: str, target_modules: tuple[str, ...]) -> Adapter:
    """The adapter that adds `b @ a` to each module, each as `written`.

    `r` is the largest rank and `lora_alpha` equals the rank in every module, so that the scaling is 1 both
    for PEFT, which reads `rank_pattern` and `alpha_pattern`, and for servers that read only `lora_alpha / r`.
    """
    ranks = {name: factors.a.shape[0] for name, factors in fused.items()}
    r = max(ranks.values())
    return Adapter(
        factors={name: (factors.a, factors.b) for name, factors in fused.items()},
        r=r,
        lora_alpha=r,
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != r},
        base_model=base_model,
        target_modules=target_modules,
    )


def written(factors: Factors, dtype: torch.dtype) -> Factors:
    """Rounded once to `dtype`. A module that nothing is left of gets rank 1: no reader takes rank 0."""
    a, b = factors.to(dtype)
    return Factors(a, b) if a.shape[0] else Factors(a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1))


def output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Float32, or float64 if an adapter is: half precision could not hold a scaling folded into it."""
    dtype = torch.float32
    for adapter in adapters:
        for a, _ in adapter.described.values():
            dtype = torch.promote_types(dtype, a.dtype)
    return dtype


def common_targets(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Each adapter's `target_modules` select its own modules, so their union selects the fused one's."""
    return tuple(sorted({name for adapter in adapters for name in adapter.target_modules or adapter.factors}))


def _share(adapter: Adapter, module: str, shape: tuple[int, int], where: str) -> Factors:
    if module not in adapter.factors:
        m, n = shape
        return Factors(torch.zeros(0, n, dtype=torch.float64), torch.zeros(m, 0, dtype=torch.float64))
    a, b = adapter.factors[module]
    check_finite_factors(module, (a, b), where)
    return Factors(adapter.scaling(module) * a.double(), b.double())


def _require_one_shape(module: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise BadInput(
                f"{name}: module '{module}' is {shape[0]} x {shape[1]} but {shapes[first][0]} x "
                f"{shapes[first][1]} in {first}; fuse adapters of one base"
            )
