"""Linear algebra on a product B A that is never formed. Float64 throughout; arithmetic only.

Legend: M out_features, N in_features, K rank of the product, C = min(M, K), D = min(N, K).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

FAR = 1e-10
"""Squares of singular values that are all above this share of the largest are known to six digits or more."""


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


def core(factors: Factors) -> Core:
    """QR of B and of A^T with their small product between: a lossless change of basis (arXiv 2509.17786)."""
    left, r_b = _side(factors.b)
    right, r_a = _side(factors.a.T)
    return Core(left, r_b @ r_a.T, right)


def middle(whole: Factors | Core) -> Tensor:
    """[C, D], with the singular values of B A: `core` without its bases, at half the cost."""
    if isinstance(whole, Core):
        return whole.middle
    low_b, low_a = (
        torch.linalg.qr(columns, mode="r")[1] if columns.shape[0] > columns.shape[1] else columns
        for columns in (whole.b, whole.a.T)
    )
    return low_b @ low_a.T


def _side(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R; what is no higher than wide is its own R."""
    m, k = columns.shape
    return torch.linalg.qr(columns) if m > k else (torch.eye(m, dtype=columns.dtype), columns)


def svd(whole: Factors | Core, kept: Callable[[Tensor], int] = len) -> Svd:
    """The SVD of B A at the cost of a K by K one. The largest entry of every column of u is positive.

    Of u and vh only the first `kept(s)` triplets are made; s is whole.
    """
    left, middle, right = whole if isinstance(whole, Core) else core(whole)
    u, s, vh = _by_squares(middle) or torch.linalg.svd(middle, full_matrices=False)
    count = kept(s)
    u, vh = left @ u[:, :count], vh[:count] @ right.T
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign() if count else u[:1]
    return Svd(u * sign, s, vh * sign.T)


def _by_squares(m: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The thin SVD of a wide or square M from M M^T = U S^2 U^T: half the work. None if that is inexact."""
    if m.shape[0] > m.shape[1] or (found := squared(m)) is None:
        return None
    u, s = found
    return u, s, (u.T @ m) / s[:, None]


def squared(m: Tensor) -> tuple[Tensor, Tensor] | None:
    """Left singular vectors of M [R, N] and its R singular values in falling order, from M M^T.

    A square loses half of the digits of what is small, so None unless all R values are well above rounding.
    """
    if not m.numel():
        return None
    squares, u = torch.linalg.eigh(gram_matrix(m.T))
    if not float(squares[0]) > FAR * float(squares[-1]):
        return None
    return u.flip(1), squares.flip(0).sqrt()


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


def gram_matrix(columns: Tensor) -> Tensor:
    """X^T X, by numpy: it knows that the product is symmetric (BLAS' syrk) and computes half of it."""
    x = columns.numpy()
    return torch.from_numpy(x.T @ x)


@contextmanager
def one_thread() -> Generator[int]:
    """LAPACK's last digits depend on the number of threads: with one, equal inputs give equal bytes.

    Yields how many there were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _blas().limit(limits=1, user_api="blas"):
            yield threads
    finally:
        torch.set_num_threads(threads)


@cache
def _blas() -> ThreadpoolController:
    """Of numpy's BLAS, which is not torch's; finding the libraries of a process takes milliseconds."""
    return ThreadpoolController()
