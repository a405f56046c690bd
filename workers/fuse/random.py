"""The control that says what noise would do: random factors with the norms of the real ones."""

from __future__ import annotations

import hashlib

import torch

from workers.fuse.factors import Factors, norm
from workers.fuse.normal import Module
from workers.fuse.rule import Options


def random(module: Module, options: Options) -> Factors:  # noqa: ARG001 - every rule has this signature
    """B A of sum_i w_i D_i's shape, rank and Frobenius norm, with Gaussian A and B.

    Drawn from the module's name alone, so that equal plans give equal bytes.
    """
    target = module.stacked()
    digest = hashlib.blake2b(module.name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    a = torch.randn(target.a.shape, generator=generator, dtype=torch.float64)
    b = torch.randn(target.b.shape, generator=generator, dtype=torch.float64)
    drawn = norm(Factors(a, b))
    scale = (norm(target) / drawn) ** 0.5 if drawn else 0.0
    return Factors(a * scale, b * scale)
