"""Spaces that all adapters of one module share: small exact coordinates for rules that work entry by entry.

Legend: M out_features, N in_features, T adapters, C and D columns of the shared bases (at most the sum of
ranks).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from workers.fuse.basis import gram_matrix, squared
from workers.fuse.factors import Core, Factors, Svd, svd
from workers.fuse.normal import Module

NULL = 1e-12
"""A singular value below this share of the largest is rounding."""


class Shared(NamedTuple):
    """`D_i = left @ middles[i] @ right.T` for every adapter; left [M, C], middles [T, C, D], right [N, D]."""

    left: Tensor
    parts: tuple[Factors, ...]
    """The middles, in factors of the adapters' ranks."""
    right: Tensor

    @property
    def middles(self) -> Tensor:
        return torch.stack([part.b @ part.a for part in self.parts])

    def back(self, middle: Tensor) -> Core:
        return Core(self.left, middle, self.right)


def shared(module: Module) -> Shared:
    """Core space (arXiv 2509.17786, equations 4 to 6): bases of all column and of all row spaces, lossless.

    Entries depend on the bases, so these are made canonical: every share is first written U S^1/2, S^1/2 V^T,
    and the bases are the singular vectors of the stacks, largest entry positive. Then they follow from the
    deltas alone: not from how a delta is split into A and B, nor from the order of the adapters.
    """
    shares = [balanced(share) for share in module.shares]
    left = _basis(torch.cat([share.b for share in shares], dim=1))
    right = _basis(torch.cat([share.a for share in shares]).T)
    return Shared(left, tuple(Factors(share.a @ right, left.T @ share.b) for share in shares), right)


def balanced(share: Factors) -> Factors:
    """The same delta as A = S^1/2 V^T and B = U S^1/2, without the directions that are rounding."""
    u, s, vh = numerical_svd(share)
    root = s.sqrt()
    return Factors(root[:, None] * vh, u * root)


def numerical_svd(whole: Factors) -> Svd:
    """Without the singular values that are rounding."""
    u, s, vh = svd(whole, _numerical)
    return Svd(u, s[: len(vh)], vh)


def _numerical(s: Tensor) -> int:
    """How many of the singular values, in falling order, are not rounding."""
    return int((s > NULL * s[0]).sum()) if len(s) else 0


def nearest_orthogonal(columns: Tensor) -> Tensor:
    """The U V^T of `columns` = U S V^T: of all matrices with orthonormal columns (or rows) the nearest."""
    if (found := squared(columns.T)) is not None:
        v, s = found
        near = (columns @ (v / s)) @ v.T  # X (X^T X)^-1/2, orthonormal to 1e-8 or better
        return 1.5 * near - 0.5 * near @ gram_matrix(near)  # one step of Newton and Schulz squares that
    q, r = torch.linalg.qr(columns)
    u, _, vh = torch.linalg.svd(r, full_matrices=False)
    return q @ (u @ vh)


def seed_of(seed: int | None, module: str) -> int:
    """A seed for one module: a draw must not depend on which modules came before."""
    digest = hashlib.blake2b(f"{seed or 0}/{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _basis(columns: Tensor) -> Tensor:
    """Left singular vectors of `columns`, the largest entry of each positive."""
    q, r = torch.linalg.qr(columns) if columns.shape[0] > columns.shape[1] else (None, columns)
    u = _left_vectors(r)
    basis = u if q is None else q @ u
    return basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign() if len(basis.T) else basis


def _left_vectors(r: Tensor) -> Tensor:
    """Left singular vectors of R, without those of singular values that are rounding."""
    if (found := squared(r)) is not None:
        return found[0]
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return u[:, : _numerical(s)]
