"""Isotropic merging: one length for all directions."""

from __future__ import annotations

from dataclasses import replace

import torch

from workers.fuse.factors import Factors, svd
from workers.fuse.normal import Module
from workers.fuse.rule import Options
from workers.fuse.shared import NULL, nearest_orthogonal, numerical_svd, shared


def iso_c(module: Module, options: Options) -> Factors:  # noqa: ARG001 - every rule has this signature
    """Iso-C (arXiv 2502.04959, equation 5): sum_i w_i D_i = U S V^T becomes mean(S) U V^T.

    The mean is over the rank of the sum: over min(M, N) a low rank would shrink it by rank / min(M, N).
    """
    whole = numerical_svd(module.stacked())
    return _level(whole.u, whole.vh, float(whole.s.mean()) if len(whole.s) else 0.0)


def iso_c_paper(module: Module, options: Options) -> Factors:  # noqa: ARG001 - every rule has this signature
    """Iso-C (arXiv 2502.04959, equation 5) by the letter: the mean is over all min(M, N) singular values."""
    whole = numerical_svd(module.stacked())
    return _level(whole.u, whole.vh, float(whole.s.sum()) / min(module.shape))


def iso_cts(module: Module, options: Options) -> Factors:
    """Iso-CTS (arXiv 2502.04959, algorithm 2), in core space, which changes no singular value.

    The `common` share of the sum's directions is kept; each adapter adds, from what the common column space
    does not hold, its (rank - common) / T largest; all are made orthogonal and get the mean of their values.
    """
    space, weights = shared(module), module.weights
    weighted = [Factors(weight * a, b) for weight, (a, b) in zip(weights, space.parts, strict=True)]
    u, s, vh = svd(replace(module, shares=space.parts).stacked())
    if not len(s) or s[0] == 0:
        return Factors(space.right.T[:0], space.left[:, :0])
    common = max(1, round((0.8 if options.common is None else options.common) * len(s)))
    own = (len(s) - common) // len(weights)
    common = len(s) - own * len(weights)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common]]
    for a, b in weighted:
        u_i, s_i, vh_i = svd(Factors(a, b - us[0] @ (us[0].T @ b)))
        # A direction without a length is rounding, and would be given the mean one.
        left = min(own, int((s_i > NULL * s[0]).sum()))
        us.append(u_i[:, :left])
        ss.append(s_i[:left])
        vs.append(vh_i[:left])
    u = space.left @ nearest_orthogonal(torch.cat(us, dim=1))
    vh = nearest_orthogonal(torch.cat(vs).T).T @ space.right.T
    return _level(u, vh, float(torch.cat(ss).mean()))


def _level(u: torch.Tensor, vh: torch.Tensor, length: float) -> Factors:
    return Factors(length * vh, u)
