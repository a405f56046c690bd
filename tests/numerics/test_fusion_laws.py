"""Laws of fusion. Every rule is held to those that its row in `workers.rules` claims, on any adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.adapters import SHAPES, dense, dense_sum, random_adapter
from workers.adapter import Adapter
from workers.fuse import fuse
from workers.fuse.grams import GRAMS
from workers.rules import ROWS, Law
from workers.tensors import save_tensors
from workers.types import RuleOptions

CLOSE = 1e-5
"""Of the largest delta: results are float32, and some rules divide by singular values."""
FULL = 10
"""No matrix of SHAPES has a higher rank, so that cutting to it cuts nothing."""
EXAMPLES = settings(max_examples=12, deadline=None)


def rules(law: Law) -> list[str]:
    return [name for name, row in ROWS.items() if law in row.laws]


@dataclass(frozen=True)
class Plan:
    """Adapters with the folders that hold their Gram matrices, and a weight each."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    folders: tuple[Path, ...]

    def fused(self, rule: str, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """Dense result of every module. At density 1: a mask that drops entries is not linear."""
        row = ROWS[rule]
        options = RuleOptions(density=1.0 if "density" in row.options else None)
        if "gamma" in row.options:
            options = replace(options, gamma=0.0)
        if rule == "regmean":
            options = replace(options, alpha=1.0)
        rank = FULL if row.takes_rank else None
        fused, _ = fuse(
            self.adapters, weights or self.weights, rule, rank, options=options, folders=self.folders
        )
        return {name: dense(fused, name) for name in fused.factors}

    def scale(self) -> float:
        names = {name for adapter in self.adapters for name in adapter.factors}
        return max(
            float(torch.linalg.matrix_norm(dense(a, name))) for name in names for a in self.adapters
        ) * max(1.0, *(abs(weight) for weight in self.weights))

    def close(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert found.keys() == expected.keys()
        for name, one in found.items():
            assert float((one - expected[name]).abs().max()) <= CLOSE * self.scale(), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Gram matrices of as many adapters as a plan has."""
    return tuple(with_grams(tmp_path_factory.mktemp(f"gram{seed}"), seed) for seed in range(3))


def with_grams(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(64, n, generator=generator, dtype=torch.float64) for name, (_, n) in SHAPES.items()
    }
    save_tensors({name: x.T @ x for name, x in inputs.items()}, folder / GRAMS)
    return folder


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    return random_adapter(
        seed=draw(st.integers(0, 1000)),
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.sampled_from([1, 3, 8, 0.5])),
        use_rslora=draw(st.booleans()),
        ranks=draw(st.dictionaries(st.sampled_from(names), st.integers(1, 6), max_size=2)),
        shapes={name: SHAPES[name] for name in names},
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


weights = st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.5])
plans = st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3, unique_by=lambda pair: id(pair[0]))


def plan_of(pairs: list[tuple[Adapter, float]], folders: tuple[Path, ...]) -> Plan:
    # Two equal adapters share every direction, so that a base of both is not unique.
    assume(len({tensor_key(adapter) for adapter, _ in pairs}) == len(pairs))
    parts, given = zip(*pairs, strict=True)
    return Plan(parts, given, folders[: len(parts)])


def tensor_key(adapter: Adapter) -> float:
    return float(next(iter(adapter.factors.values()))[0].double().sum())


@pytest.mark.parametrize("rule", rules("identity"))
@EXAMPLES
@given(adapter=adapters())
def test_laws_identity_one_adapter_with_weight_one_is_itself(
    rule: str, folders: tuple[Path, ...], adapter: Adapter
) -> None:
    plan = Plan((adapter,), (1.0,), folders[:1])
    plan.close(plan.fused(rule), {name: dense(adapter, name) for name in adapter.factors})


@pytest.mark.parametrize("rule", rules("linear"))
@EXAMPLES
@given(pairs=plans)
def test_laws_linear_is_the_dense_weighted_sum(
    rule: str, folders: tuple[Path, ...], pairs: list[tuple[Adapter, float]]
) -> None:
    plan = plan_of(pairs, folders)
    found = plan.fused(rule)
    plan.close(found, {name: dense_sum(list(plan.adapters), list(plan.weights), name) for name in found})


@pytest.mark.parametrize("rule", rules("permutation"))
@EXAMPLES
@given(pairs=plans)
def test_laws_permutation_other_order_gives_the_same_delta(
    rule: str, folders: tuple[Path, ...], pairs: list[tuple[Adapter, float]]
) -> None:
    plan = plan_of(pairs, folders)
    back = Plan(plan.adapters[::-1], plan.weights[::-1], plan.folders[::-1])
    plan.close(back.fused(rule), plan.fused(rule))


@pytest.mark.parametrize("rule", rules("scaling"))
@EXAMPLES
@given(pairs=plans, factor=st.sampled_from([-1.0, 0.5, 3.0]))
def test_laws_scaling_all_weights_scales_the_delta(
    rule: str, folders: tuple[Path, ...], pairs: list[tuple[Adapter, float]], factor: float
) -> None:
    plan = plan_of(pairs, folders)
    scaled = plan.fused(rule, [factor * weight for weight in plan.weights])
    plan.close(scaled, {name: factor * delta for name, delta in plan.fused(rule).items()})


@pytest.mark.parametrize("rule", rules("folding"))
@EXAMPLES
@given(pairs=plans)
def test_laws_folding_alpha_or_another_split_of_the_delta_changes_nothing(
    rule: str, folders: tuple[Path, ...], pairs: list[tuple[Adapter, float]]
) -> None:
    plan = plan_of(pairs, folders)
    folded = replace(plan, adapters=tuple(resplit(adapter) for adapter in plan.adapters))
    plan.close(folded.fused(rule), plan.fused(rule))


def resplit(adapter: Adapter) -> Adapter:
    """The same deltas in float64 with scaling 1, from other factors: B R and R^-1 A."""
    factors = {}
    for name, (a, b) in adapter.factors.items():
        turn = torch.linalg.qr(
            torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(len(a))).double()
        ).Q * torch.linspace(1, 2, len(a), dtype=torch.float64)
        factors[name] = (torch.linalg.solve(turn, adapter.scaling(name) * a.double()), b.double() @ turn)
    ranks = {name: float(len(a)) for name, (a, _) in factors.items()}
    return Adapter(factors, adapter.r, adapter.r, alpha_pattern=ranks)


@pytest.mark.parametrize("rule", [name for name, row in ROWS.items() if row.cut != "refused"])
@EXAMPLES
@given(pairs=plans, rank=st.integers(1, 4))
def test_laws_reranking_a_result_of_that_rank_changes_nothing(
    rule: str, folders: tuple[Path, ...], pairs: list[tuple[Adapter, float]], rank: int
) -> None:
    plan = plan_of(pairs, folders)
    once, _ = fuse(plan.adapters, plan.weights, rule, rank, folders=plan.folders)
    again, report = fuse([once], [1.0], "svd", rank)
    before = {name: dense(once, name) for name in once.factors}
    plan.close({name: dense(again, name) for name in again.factors}, before)
    assert report["summary"]["discarded_energy"] < CLOSE


@pytest.mark.parametrize("rule", list(ROWS))
def test_laws_equal_plans_give_equal_bits(rule: str, folders: tuple[Path, ...]) -> None:
    parts = [random_adapter(seed, r=3, lora_alpha=5) for seed in range(3)]
    rank = 4 if ROWS[rule].takes_rank else None
    one, other = (fuse(parts, [1.0, 0.5, 0.7], rule, rank, folders=folders)[0] for _ in range(2))
    for name in SHAPES:
        assert all(torch.equal(x, y) for x, y in zip(one.factors[name], other.factors[name], strict=True))
