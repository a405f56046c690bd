"""Exact concatenation."""

from __future__ import annotations

from workers.fuse.normal import Module
from workers.fuse.rule import Fused, Options


def cat(module: Module, options: Options) -> Fused:  # noqa: ARG001 - every rule has this signature
    """sum_i w_i D_i without loss, at the sum of the ranks: A = [w_i s_i A_i], B = [B_i].

    On plain LoRA the same as PEFT's `add_weighted_adapter(combination_type="cat")`; CAT in arXiv 2410.13025.
    """
    return Fused(module.stacked(), discarded_energy=0.0)
