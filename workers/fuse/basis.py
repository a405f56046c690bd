"""Orthonormal bases at the cost of symmetric products: through B^T B wherever that loses nothing that counts.

Float64 throughout. What a square would lose is found by Householder's way, at two to four times the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

WELL = 1e-5
"""R's smallest diagonal entry over its largest, from which on B R^-1 is orthonormal to some 1e-11."""
FAR = 1e-3
"""The same for columns of length 1, where R comes from B^T B, which squares what rounding does: to 1e-10."""
SQUARED = 1e-8
"""Least share of the largest eigenvalue of M M^T from which on a singular value is known to eight digits."""

Map = Callable[[Tensor], Tensor]


def side(columns: Tensor) -> tuple[Tensor, Map]:
    """R of B = Q R and the map x -> Q x, for B [M, K]; B itself where it is no higher than wide."""
    if columns.shape[0] <= columns.shape[1]:
        return columns, lambda x: x
    r = _by_cholesky(columns)
    if r is None:
        r = torch.linalg.qr(columns, mode="r")[1]
        if not _spread(r) > WELL:
            q, r = torch.linalg.qr(columns)
            return r, lambda x: q @ x
    # B (R^-1 x), as a transposed product: MKL takes half the time for one that is wide.
    return r, lambda x: (torch.linalg.solve_triangular(r, x, upper=True).T @ columns.T).T


def squared(m: Tensor) -> tuple[Tensor, Tensor] | None:
    """Left singular vectors of M [R, N] and its R singular values in falling order, from M M^T.

    None unless each is above 1e-4 of the largest.
    """
    if not 0 < m.shape[0] <= m.shape[1]:
        return None
    squares, u = torch.linalg.eigh(gram_matrix(m.T))
    if not float(squares[0]) > SQUARED * float(squares[-1]):
        return None
    return u.flip(1), squares.flip(0).sqrt()


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
    # Here: a host, which fuses nothing, runs where this is not installed.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _by_cholesky(columns: Tensor) -> Tensor | None:
    """R by a Cholesky factorization of B^T B, at half of QR's cost; None where columns may be dependent."""
    gram = gram_matrix(columns)
    lengths = gram.diagonal().sqrt()
    if not lengths.numel() or not float(lengths.min()) > 0:
        return None
    r, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None], upper=True)
    return r * lengths if not failed and _spread(r) > FAR else None


def _spread(r: Tensor) -> float:
    diagonal = r.diagonal().abs()
    return float(diagonal.min() / diagonal.max()) if diagonal.numel() else 1.0
