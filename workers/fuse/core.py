"""The exact sum in core space."""

from __future__ import annotations

from workers.fuse.factors import Core, Factors
from workers.fuse.normal import Module
from workers.fuse.rule import Options
from workers.fuse.spaces import in_core


def core(module: Module, options: Options) -> Factors | Core:
    """Task arithmetic in core space (arXiv 2509.17786, equation 7): U (sum_i w_i M_i) V^T.

    The same matrix as `cat`, at no more rank than the adapters' joint column or row space has.
    """
    return _sum(module, options)


_sum = in_core(lambda middles, weights, options, seed: (weights[:, None, None] * middles).sum(0))  # noqa: ARG005
