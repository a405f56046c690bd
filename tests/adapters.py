"""Random adapters and the dense matrices they stand for, computed here from the papers' formulas alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from workers.adapter import Adapter

SHAPES = {
    "model.layers.0.self_attn.q_proj": (12, 10),
    "model.layers.0.self_attn.v_proj": (6, 10),
    "model.layers.0.mlp.down_proj": (10, 16),
}
"""Module name -> (out_features, in_features)."""


def random_adapter(
    seed: int,
    r: int = 3,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    ranks: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    **fields: object,
) -> Adapter:
    """Both factors random. `ranks` gives modules a rank of their own; alphas by `alpha_pattern`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (m, n) in shapes.items():
        rank = (ranks or {}).get(name, r)
        a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        factors[name] = (a.to(dtype), b.to(dtype))
    return Adapter(factors, r, r if lora_alpha is None else lora_alpha, use_rslora, **fields)  # type: ignore[arg-type]


def dense(adapter: Adapter, name: str) -> Tensor:
    """What the adapter adds to a module's weight, in float64; zero where it has no such module."""
    if name not in adapter.factors:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    a, b = (factor.double() for factor in adapter.factors[name])
    alpha = adapter.alpha_pattern.get(name, adapter.lora_alpha)
    rank = a.shape[0]
    return (alpha / (math.sqrt(rank) if adapter.use_rslora else rank)) * (b @ a)


def dense_sum(adapters: list[Adapter], weights: list[float], name: str) -> Tensor:
    return sum(
        (weight * dense(adapter, name) for adapter, weight in zip(adapters, weights, strict=True)),
        torch.zeros(SHAPES[name], dtype=torch.float64),
    )


def relative_error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """|found - expected| / |scale|, in Frobenius norms; `scale` is `expected` unless given."""
    size = float(torch.linalg.matrix_norm(expected if scale is None else scale))
    error = float(torch.linalg.matrix_norm(found - expected))
    return error / size if size else error
