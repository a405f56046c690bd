"""Linear algebra on a product B A that is never formed. Float64 throughout; arithmetic only.

Legend: M out_features, N in_features, K rank of the product, C = min(M, K), D = min(N, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.fuse.basis import Map, gram_matrix, side, squared


class Factors(NamedTuple):
    """The matrix `b @ a` [M, N], with a [K, N] and b [M, K]."""

    a: Tensor
    b: Tensor

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.a.to(dtype), self.b.to(dtype))


class Core(NamedTuple):
    """`left @ middle @ right.T`, with orthonormal columns left [M, C] and right [N, D]; middle [C, D]."""

    left: Tensor
    middle: Tensor
    right: Tensor

    def factors(self) -> Factors:
        """Of the smaller of both ranks."""
        if self.middle.shape[0] <= self.middle.shape[1]:
            return Factors(self.middle @ self.right.T, self.left)
        return Factors(self.right.T, self.left @ self.middle)


class Svd(NamedTuple):
    """Thin singular value decomposition: u [M, S], s [S] in falling order, vh [S, N]."""

    u: Tensor
    s: Tensor
    vh: Tensor


def middle(whole: Factors | Core) -> Tensor:
    """[C, D], with the singular values of B A."""
    if isinstance(whole, Core):
        return whole.middle
    return side(whole.b)[0] @ side(whole.a.T)[0].T


def svd(whole: Factors | Core, kept: Callable[[Tensor], int] = len) -> Svd:
    """The SVD of B A at the cost of a K by K one. The largest entry of every column of u is positive.

    With QR of B and of A^T the small product between them is a lossless change of basis (arXiv 2509.17786).
    Of u and vh only the first `kept(s)` triplets are made; s is whole.
    """
    small, left, right = _turned(whole)
    u, s, vh = _by_squares(small) or torch.linalg.svd(small, full_matrices=False)
    count = kept(s)
    u, vh = left(u[:, :count]), right(vh[:count].T).T
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign() if u.numel() else u[:1]
    return Svd(u * sign, s, vh * sign.T)


def _turned(whole: Factors | Core) -> tuple[Tensor, Map, Map]:
    if isinstance(whole, Core):
        return whole.middle, lambda x: whole.left @ x, lambda x: whole.right @ x
    (low_b, left), (low_a, right) = side(whole.b), side(whole.a.T)
    return low_b @ low_a.T, left, right


def _by_squares(m: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The thin SVD of a wide or square M from M M^T = U S^2 U^T: half the work. None if that is inexact."""
    if (found := squared(m)) is None:
        return None
    u, s = found
    return u, s, (u.T @ m) / s[:, None]


def norm(factors: Factors) -> float:
    """Frobenius norm of B A. Through the core: a Gram product would lose half the digits of a small norm."""
    return float(torch.linalg.matrix_norm(middle(factors)))


def inner_products(parts: Sequence[Factors]) -> list[list[float]]:
    """Frobenius inner products <B_i A_i, B_j A_j> = tr((B_i^T B_j) (A_j A_i^T)) of every two."""
    a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1)
    return block_sums(gram_matrix(b) * gram_matrix(a.T), [part.a.shape[0] for part in parts])


def block_sums(square: Tensor, sizes: Sequence[int]) -> list[list[float]]:
    """Of a matrix that is made of `sizes` by `sizes` blocks."""
    rows = torch.stack([block.sum(0) for block in square.split(list(sizes))])
    return torch.stack([block.sum(1) for block in rows.split(list(sizes), dim=1)], dim=1).tolist()
