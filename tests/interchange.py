"""A tiny base and adapters on it, as Transformers and PEFT see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.adapters import random_adapter
from workers.adapter import Adapter

TOKENS = torch.arange(40).reshape(2, 20) * 5 % 259
CLOSE = 1e-5
"""Largest difference of float32 logits that another order of summation explains."""


def load(base_dir: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, **arguments).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits


def linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Every linear layer but the output head: name -> (out_features, in_features)."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return {name: tuple(part.weight.shape) for name, part in found.items() if name != "lm_head"}


@torch.no_grad()
def plainly_merged(base_dir: Path, adapters: list[Adapter], weights: list[float]) -> PreTrainedModel:
    """The base with sum_i w_i s_i B_i A_i added to its weights, in float64 and by hand."""
    model = load(base_dir)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, (a, b) in adapter.factors.items():
            part = model.get_submodule(name).weight
            part += (weight * adapter.scaling(name) * (b.double() @ a.double())).float()
    return model


def small(seed: int, shapes: dict[str, tuple[int, int]], **fields: Any) -> Adapter:
    """A random adapter that moves the logits of the tiny base, and does not blow them up."""
    adapter = random_adapter(seed, shapes=shapes, **fields)
    factors = {name: (0.1 * a, 0.1 * b) for name, (a, b) in adapter.factors.items()}
    return Adapter(**{**adapter.__dict__, "factors": factors})
