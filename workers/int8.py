"""Weights kept in int8 between passes: symmetric, one scale for every `GROUP` elements, in plain torch.

    scale = max |w| / 127,  q = round(w / scale),  w' = q * scale

What a pass computes with is w', so an adapter trained on such a base belongs to w'. Stands where DeepSpeed's
quantizer would: that one has CUDA kernels alone, rounds through float16, and picks another group size for
every parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 128
"""Elements that share a scale; 3% more to store with float32 scales."""


def quantized(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of the same shape, scales [elements / GROUP]); the elements must be a multiple of GROUP."""
    groups = weights.reshape(-1, GROUP).to(torch.promote_types(weights.dtype, torch.float32))
    scales = groups.abs().amax(dim=1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (groups / safe[:, None]).round().to(torch.int8).view(weights.shape), scales


def restored(values: Tensor, scales: Tensor) -> Tensor:
    """The weights that `quantized` stands for, in the dtype of the scales."""
    return (values.reshape(scales.numel(), -1).to(scales.dtype) * scales[:, None]).view(values.shape)


class Int8:
    """The two calls that DeepSpeed's gathers make of a quantizer."""

    def quantize(self, param: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return quantized(param)

    def dequantize(self, quantized_param: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        weights = restored(quantized_param, scale)
        return weights if dtype is None else weights.to(dtype)


def store(parameter: Any) -> bool:
    """Replace this rank's share of a partitioned parameter by int8. False if it has no whole groups."""
    share = parameter.ds_tensor
    if share.numel() % GROUP or share.numel() * parameter.ds_zero_partition_world_size != parameter.ds_numel:
        return False
    values, scales = quantized(share.data)
    for name in ("ds_numel", "status", "final_location"):
        setattr(values, name, getattr(share, name))
    values.ds_quant_scale = scales  # pyright: ignore[reportAttributeAccessIssue]
    parameter.ds_tensor = values
    return True
