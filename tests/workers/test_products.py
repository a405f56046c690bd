"""Batched and grouped products against a plain loop: the same bits, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from workers.products import Batched, Grouped


def loop(x, w, sizes):
    """x_j @ w_j, segment by segment."""
    return torch.cat([part @ matrix for part, matrix in zip(x.split(sizes), w, strict=True)])


def outer_loop(x, y, sizes):
    return torch.stack([a.t() @ b for a, b in zip(x.split(sizes), y.split(sizes), strict=True)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [16, 48, 512])
@pytest.mark.parametrize(("features", "rank"), [(32, 2), (256, 8), (688, 16), (256, 64)])
def test_batched_products_have_the_bits_of_a_loop(threads, tokens, features, rank):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        jobs, sizes = 5, [tokens] * 5
        x, a = torch.randn(jobs * tokens, features), torch.randn(jobs, rank, features)
        batched = Batched(jobs)
        down = batched.by_rows(x, a)
        assert torch.equal(down, loop(x, a.transpose(1, 2), sizes))
        assert torch.equal(batched.by_columns(down, a), loop(down, a, sizes))
        assert torch.equal(batched.outer(down, x), outer_loop(down, x, sizes))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_a_loop(dtype):
    torch.manual_seed(0)
    sizes = [16, 80, 32]
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, a = torch.randn(128, 64).to(dtype), torch.randn(3, 8, 64).to(dtype)
    grouped, bound = Grouped(ends), 1e-5 if dtype == torch.float32 else 2e-2
    down = grouped.by_rows(x, a)
    for found, expected in (
        (down, loop(x, a.transpose(1, 2), sizes)),
        (grouped.by_columns(down, a), loop(down, a, sizes)),
        (grouped.outer(down, x), outer_loop(down, x, sizes)),
    ):
        assert float((found - expected).float().norm() / expected.float().norm()) < bound


def test_a_number_a_job_becomes_a_number_a_token():
    x = torch.tensor([1.0, 2.0])
    assert Batched(2).per_token(x, 4).flatten().tolist() == [1, 1, 2, 2]
    assert Grouped(torch.tensor([1, 4], dtype=torch.int32)).per_token(x, 4).flatten().tolist() == [1, 2, 2, 2]
