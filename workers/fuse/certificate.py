"""What one module's fusion lost and what stood in its way: exact figures that are cheap in factors.

Legend: M out_features, N in_features, T adapters, R rank of an adapter in this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from workers.fuse.basis import gram_matrix
from workers.fuse.factors import Factors, block_sums, middle, norm
from workers.fuse.normal import Module
from workers.fuse.rule import Fused

ROWS = 64
"""Of M, evenly spread, on whose entries signs are compared: all of them would need the dense delta."""


@dataclass(frozen=True)
class ModuleReport:
    """One module before and after. Norms are Frobenius norms of the delta added to the base weight."""

    rank: int
    discarded_energy: float
    """sqrt(sum_{i>R} s_i^2 / sum_i s_i^2) of the rule's result, from 0 to 1."""
    error: float
    """Frobenius norm of what was cut from the rule's result: exact, and no matrix of that rank is nearer."""
    spectral_error: float
    """Spectral norm of the same: no input of length 1 is answered further off."""
    norm_before: float
    """Of the exact weighted sum."""
    norm_after: float
    effective_rank: float
    """exp of the entropy of s / sum s of the result (Roy and Vetterli, EUSIPCO 2007)."""
    column_overlap: float
    row_overlap: float
    """Mean over pairs of |U_i^T U_j|_F^2 / min(R_i, R_j), U_i an orthonormal basis of what adapter i writes
    (columns) or reads (rows): 0 for orthogonal subspaces, 1 where one holds the other."""
    sign_conflict: float
    """Share of sum_i |w_i D_i| against the sign of sum_i w_i D_i, in at most 64 rows: 0 to 0.5."""


def module_report(whole: Module, module: Module, fused: Fused) -> tuple[ModuleReport, Tensor]:
    """The figures, and the singular values [S] of the result in falling order.

    `module` is `whole`, and `fused` the result, each in any coordinates: only signs need the entries.
    """
    spectrum, after = _spectrum(fused)
    report = ModuleReport(
        rank=fused.factors.a.shape[0],
        discarded_energy=fused.discarded_energy,
        error=fused.error,
        spectral_error=fused.spectral_error,
        norm_before=norm(module.stacked()),
        norm_after=after,
        effective_rank=effective_rank(spectrum),
        column_overlap=_overlap([share.b for share in module.shares]),
        row_overlap=_overlap([share.a.T for share in module.shares]),
        sign_conflict=_sign_conflict(whole.shares, whole.weights),
    )
    return report, spectrum


def _spectrum(fused: Fused) -> tuple[Tensor, float]:
    """Singular values of the result and its norm; from cutting, if it was cut."""
    if fused.spectrum is not None:
        return fused.spectrum, float(torch.linalg.vector_norm(fused.spectrum))
    small = middle(fused.factors)
    return torch.linalg.svdvals(small), float(torch.linalg.matrix_norm(small))


def effective_rank(spectrum: Tensor) -> float:
    """exp(-sum_i p_i log p_i) with p = s / sum s; 0 for the zero delta."""
    total = float(spectrum.sum())
    return math.exp(float(torch.special.entr(spectrum / total).sum())) if total > 0 else 0.0


def _overlap(columns: Sequence[Tensor]) -> float:
    bases = [torch.linalg.qr(part)[0] for part in columns if part.shape[1]]
    if len(bases) < 2:
        return 0.0
    ranks, whole = [basis.shape[1] for basis in bases], torch.cat(bases, dim=1)
    mass = block_sums(gram_matrix(whole).square(), ranks)
    pairs = [mass[i][j] / min(ranks[i], ranks[j]) for i, j in combinations(range(len(ranks)), 2)]
    return math.fsum(pairs) / len(pairs)


def _sign_conflict(shares: Sequence[Factors], weights: Sequence[float]) -> float:
    """In place on one buffer: with e_i = w_i D_i, what is against the sum is (sum |e_i| - |sum e_i|) / 2."""
    step = max(1, -(-shares[0].b.shape[0] // ROWS))
    absolute, net, entries = 0.0, None, None
    for (a, b), weight in zip(shares, weights, strict=True):
        entries = torch.matmul(weight * b[::step], a, out=entries)
        net = entries.clone() if net is None else net.add_(entries)
        absolute += float(torch.linalg.vector_norm(entries, 1))
    against = absolute - float(torch.linalg.vector_norm(net, 1))
    return max(against, 0.0) / 2 / absolute if absolute > 0 else 0.0
