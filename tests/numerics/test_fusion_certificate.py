"""The certificate of a fusion says what a dense computation would find."""

from __future__ import annotations

import math

import pytest
import torch

from tests.adapters import SHAPES, dense, dense_sum, random_adapter
from workers.adapter import Adapter
from workers.fuse import fuse

WEIGHTS = [1.0, -0.5]
Q, V, DOWN = SHAPES


@pytest.fixture
def parts() -> list[Adapter]:
    return [random_adapter(1, r=3, lora_alpha=5), random_adapter(2, r=2, use_rslora=True)]


@pytest.mark.parametrize("rule", ["svd", "ties", "tsv"])
def test_certificate_error_is_the_distance_to_the_uncut_result(parts: list[Adapter], rule: str) -> None:
    whole, _ = fuse(parts, WEIGHTS, "cat" if rule == "svd" else rule)
    kept, report = fuse(parts, WEIGHTS, rule, 2)
    for name in SHAPES:
        apart = dense(whole, name) - dense(kept, name)
        found = report["modules"][name]
        assert found["error"] == pytest.approx(float(torch.linalg.matrix_norm(apart)), rel=1e-5)
        assert found["spectral_error"] == pytest.approx(float(torch.linalg.matrix_norm(apart, 2)), rel=1e-5)
    total = math.sqrt(sum(module["error"] ** 2 for module in report["modules"].values()))
    assert report["summary"]["error"] == pytest.approx(total)


def test_certificate_overlap_is_that_of_the_subspaces_that_adapters_write_and_read(
    parts: list[Adapter],
) -> None:
    _, report = fuse(parts, WEIGHTS)
    for name in SHAPES:
        bases = [torch.linalg.svd(dense(part, name)) for part in parts]
        (u, v), (x, y) = ((s[0][:, :r], s[2][:r].T) for s, r in zip(bases, (3, 2), strict=True))
        found = report["modules"][name]
        assert found["column_overlap"] == pytest.approx(float((u.T @ x).square().sum()) / 2)
        assert found["row_overlap"] == pytest.approx(float((v.T @ y).square().sum()) / 2)


def test_certificate_overlap_of_an_adapter_with_itself_is_one_and_alone_none(parts: list[Adapter]) -> None:
    _, twice = fuse([parts[0], parts[0]], [1.0, 1.0])
    assert twice["summary"]["column_overlap"] == pytest.approx(1.0)
    _, alone = fuse(parts[:1], [1.0])
    assert alone["summary"]["row_overlap"] == alone["summary"]["sign_conflict"] == 0.0


def test_certificate_sign_conflict_is_the_share_of_mass_against_the_sum(parts: list[Adapter]) -> None:
    _, report = fuse(parts, WEIGHTS)
    for name in SHAPES:
        weighted = torch.stack([w * dense(part, name) for w, part in zip(WEIGHTS, parts, strict=True)])
        against = weighted.sign() != weighted.sum(0).sign()
        share = float((weighted.abs() * against).sum() / weighted.abs().sum())
        assert report["modules"][name]["sign_conflict"] == pytest.approx(share)
    _, opposed = fuse([parts[0], parts[0]], [1.0, -1.0])
    assert opposed["summary"]["sign_conflict"] == pytest.approx(0.5)


def test_certificate_spectrum_and_effective_rank_are_of_the_result(parts: list[Adapter]) -> None:
    _, report = fuse(parts, WEIGHTS)
    squares = torch.zeros(5, dtype=torch.float64)
    for name in SHAPES:
        s = torch.linalg.svdvals(dense_sum(parts, WEIGHTS, name))[:5]
        squares += s.square()
        p = s / s.sum()
        entropy = float(-(p * p.log()).sum())
        assert report["modules"][name]["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-6)
    assert report["spectrum"] == pytest.approx(squares.sqrt().tolist(), rel=1e-6)
    _, cut = fuse(parts, WEIGHTS, "svd", 2)
    assert cut["spectrum"] == pytest.approx(squares.sqrt().tolist()[:2], rel=1e-6)
