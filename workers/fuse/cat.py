"""Exact concatenation."""

from __future__ import annotations

from workers.fuse.factors import Factors
from workers.fuse.normal import Module
from workers.fuse.rule import Options


def cat(module: Module, options: Options) -> Factors:  # noqa: ARG001 - every rule has this signature
    """sum_i w_i D_i without loss, at the sum of the ranks: A = [w_i s_i A_i], B = [B_i].

    On plain LoRA the same as PEFT's `add_weighted_adapter(combination_type="cat")`; CAT in arXiv 2410.13025.
    Also what rule `svd` cuts: Eckart and Young, Psychometrika 1, 1936.
    """
    return module.stacked()
