"""Fusion obeys algebra. Every expectation is a dense float64 matrix computed without the code under test."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters import SHAPES, dense, dense_sum, random_adapter, relative_error
from workers.adapter import Adapter
from workers.fuse import RULES, fuse
from workers.types import BadInput

FLOAT32 = 1e-6
Q, V, DOWN = SHAPES

weight = st.floats(-2, 2, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any plain LoRA adapter: some modules, own ranks and alphas, rsLoRA or not, half precision or not."""
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    return random_adapter(
        seed=draw(st.integers(0, 1000)),
        r=draw(st.integers(1, 5)),
        lora_alpha=draw(st.sampled_from([1, 3, 8, 16, 0.5])),
        use_rslora=draw(st.booleans()),
        ranks=draw(st.dictionaries(st.sampled_from(names), st.integers(1, 8), max_size=2)),
        shapes={name: SHAPES[name] for name in names},
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        alpha_pattern=draw(st.dictionaries(st.sampled_from(names), st.sampled_from([2, 5]), max_size=1)),
    )


plans = st.lists(st.tuples(adapters(), weight), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_fuse_one_adapter_with_weight_one_is_that_adapter(adapter: Adapter) -> None:
    for rule, rank in (("cat", None), ("svd", 8)):
        fused, _ = fuse([adapter], [1.0], rule, rank)
        assert fused.factors.keys() == adapter.factors.keys()
        for name in adapter.factors:
            assert relative_error(dense(fused, name), dense(adapter, name)) < FLOAT32


@settings(max_examples=60, deadline=None)
@given(plans)
def test_cat_any_adapters_equals_dense_weighted_sum(plan: list[tuple[Adapter, float]]) -> None:
    parts, weights = [adapter for adapter, _ in plan], [weight for _, weight in plan]
    fused, report = fuse(parts, weights)
    assert set(fused.factors) == {name for adapter in parts for name in adapter.factors}
    for name in fused.factors:
        expected = dense_sum(parts, weights, name)
        scale = dense_sum(parts, [abs(weight) + 1e-3 for weight in weights], name)
        assert relative_error(dense(fused, name), expected, scale) < FLOAT32
        found = report["modules"][name]
        assert found["discarded_energy"] == 0.0
        size = float(torch.linalg.matrix_norm(expected))
        assert found["norm_before"] == found["norm_after"] == pytest.approx(size, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 6))
def test_svd_any_adapters_equals_truncation_of_dense_sum(
    plan: list[tuple[Adapter, float]], rank: int
) -> None:
    parts, weights = [adapter for adapter, _ in plan], [weight for _, weight in plan]
    fused, report = fuse(parts, weights, "svd", rank)
    for name in fused.factors:
        exact = dense_sum(parts, weights, name)
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        best = u[:, :rank] @ (s[:rank, None] * vh[:rank])
        error = relative_error(dense(fused, name), exact)
        energy = float(torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s)) if s[0] > 0 else 0.0
        found = report["modules"][name]
        # Not below the optimum, and as near as it: the truncation itself is unique only where s has a gap.
        assert error == pytest.approx(relative_error(best, exact), abs=FLOAT32)
        assert found["discarded_energy"] == pytest.approx(energy, abs=1e-9)
        assert found["norm_after"] == pytest.approx(
            float(torch.linalg.vector_norm(s[:rank])), rel=1e-9, abs=1e-9
        )


def test_svd_gap_in_spectrum_gives_the_same_matrix_as_dense_svd() -> None:
    parts = [random_adapter(1, r=4, lora_alpha=9), random_adapter(2, r=2, use_rslora=True)]
    fused, _ = fuse(parts, [0.7, -0.4], "svd", 3)
    for name in SHAPES:
        u, s, vh = torch.linalg.svd(dense_sum(parts, [0.7, -0.4], name), full_matrices=False)
        assert relative_error(dense(fused, name), u[:, :3] @ (s[:3, None] * vh[:3])) < FLOAT32


@settings(max_examples=40, deadline=None)
@given(plans, st.randoms(use_true_random=False))
def test_fuse_other_order_gives_same_delta(plan: list[tuple[Adapter, float]], random) -> None:
    shuffled = random.sample(plan, len(plan))
    fused = [fuse([a for a, _ in order], [w for _, w in order])[0] for order in (plan, shuffled)]
    for name in fused[0].factors:
        scale = dense_sum([a for a, _ in plan], [abs(w) + 1e-3 for _, w in plan], name)
        assert relative_error(dense(fused[1], name), dense(fused[0], name), scale) < FLOAT32


@settings(max_examples=40, deadline=None)
@given(adapters(), adapters(), weight, weight, weight)
def test_cat_is_linear_in_the_weights(a: Adapter, b: Adapter, x: float, y: float, c: float) -> None:
    one, _ = fuse([a, b], [x, y])
    scaled, _ = fuse([a, b], [c * x, c * y])
    alone = [fuse([a, b], [x, 0.0])[0], fuse([a, b], [0.0, y])[0]]
    for name in one.factors:
        scale = dense_sum([a, b], [abs(x) + 1e-3, abs(y) + 1e-3], name)
        assert relative_error(dense(scaled, name), c * dense(one, name), scale) < 4 * FLOAT32
        apart = dense(alone[0], name) + dense(alone[1], name)
        assert relative_error(apart, dense(one, name), scale) < 4 * FLOAT32


def test_fuse_scaling_of_inputs_is_folded_into_the_result() -> None:
    plain = random_adapter(5, r=4, lora_alpha=4)
    for alpha, rslora, factor in ((8, False, 2.0), (4, True, 2.0), (3, False, 0.75)):
        same = Adapter(plain.factors, 4, alpha, rslora)
        fused, _ = fuse([same], [1.0])
        assert not fused.use_rslora
        for name in SHAPES:
            assert fused.scaling(name) == 1.0
            assert relative_error(dense(fused, name), factor * dense(plain, name)) < FLOAT32


def test_fuse_different_ranks_and_modules_keeps_the_true_rank_of_each_module() -> None:
    one = random_adapter(1, r=2, shapes={Q: SHAPES[Q], V: SHAPES[V]})
    other = random_adapter(2, r=5, shapes={Q: SHAPES[Q], DOWN: SHAPES[DOWN]})
    fused, report = fuse([one, other], [1.0, 1.0])
    assert (fused.r, fused.lora_alpha) == (7, 7)
    assert fused.rank_pattern == fused.alpha_pattern == {V: 2, DOWN: 5}
    assert {name: module["rank"] for name, module in report["modules"].items()} == {Q: 7, V: 2, DOWN: 5}


def test_svd_rank_above_what_a_module_can_have_is_clamped_and_said() -> None:
    one, other = random_adapter(1, r=2), random_adapter(2, r=3)
    fused, report = fuse([one, other], [1.0, 1.0], "svd", 64)
    assert fused.r == 5
    assert report["notes"] == ["rank 64 is more than 3 modules can have; they have their full rank, 5"]
    assert report["summary"]["discarded_energy"] < 1e-12
    wide, _ = fuse([random_adapter(seed, r=5) for seed in range(3)], [1.0] * 3, "svd", 64)
    assert (wide.r, wide.rank_pattern) == (10, {V: 6})


def test_fuse_opposite_weights_gives_the_zero_delta_and_finite_figures() -> None:
    adapter = random_adapter(3)
    fused, report = fuse([adapter, adapter], [1.0, -1.0], "svd", 2)
    for name in SHAPES:
        size = torch.linalg.matrix_norm(dense(adapter, name))
        assert float(torch.linalg.matrix_norm(dense(fused, name)) / size) < 1e-12
    assert math.isfinite(report["summary"]["discarded_energy"])
    json.dumps(report, allow_nan=False)


def test_fuse_untrained_adapter_discards_nothing() -> None:
    adapter = random_adapter(3)
    untrained = Adapter({name: (a, 0 * b) for name, (a, b) in adapter.factors.items()}, 3, 3)
    _, report = fuse([untrained], [1.0], "svd", 1)
    assert set(report["summary"].values()) == {0.0}
    assert report["cosines"] == [[0.0]]


def test_fuse_report_summary_is_of_the_whole_adapter() -> None:
    parts = [random_adapter(1), random_adapter(2), random_adapter(3)]
    weights = [1.0, 0.5, 2.0]
    fused, report = fuse(parts, weights, "svd", 4)
    whole = torch.cat([dense_sum(parts, weights, name).flatten() for name in SHAPES])
    kept = torch.cat([dense(fused, name).flatten() for name in SHAPES])
    assert report["summary"]["norm_before"] == pytest.approx(float(whole.norm()), rel=1e-9)
    assert report["summary"]["norm_after"] == pytest.approx(float(kept.norm()), rel=FLOAT32)
    lost = float((whole - kept).norm() / whole.norm())
    assert report["summary"]["discarded_energy"] == pytest.approx(lost, rel=1e-5)


def test_fuse_report_cosines_are_those_of_the_dense_deltas() -> None:
    parts = [
        random_adapter(1),
        random_adapter(2, r=5, shapes={Q: SHAPES[Q], V: SHAPES[V]}),
        random_adapter(3),
    ]
    _, report = fuse(parts, [1.0, 0.0, -1.0])
    flat = [torch.cat([dense(adapter, name).flatten() for name in SHAPES]) for adapter in parts]
    for i, one in enumerate(flat):
        for j, other in enumerate(flat):
            cosine = float(torch.cosine_similarity(one, other, dim=0))
            assert report["cosines"][i][j] == pytest.approx(cosine, abs=1e-12)


def test_fuse_half_precision_sources_are_kept_in_float32() -> None:
    adapter = random_adapter(1, lora_alpha=7, dtype=torch.bfloat16)
    fused, _ = fuse([adapter], [1.0])
    assert {factor.dtype for pair in fused.factors.values() for factor in pair} == {torch.float32}


def test_fuse_number_of_threads_changes_no_bit() -> None:
    shapes = {"model.layers.0.mlp.up_proj": (4096, 1024)}
    parts = [random_adapter(seed, r=16, shapes=shapes) for seed in range(3)]
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(fuse(parts, [1.0, 1.0, 1.0], "svd", 16)[0].factors)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for name in shapes:
        assert all(torch.equal(x, y) for x, y in zip(results[0][name], results[1][name], strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, 1.0], "svdd", 4), "'svdd' is unknown; did you mean 'svd'"),
        (([1.0], "cat", None), "1 weights for 2 adapters"),
        (([1.0, math.nan], "cat", None), "not a finite number"),
        (([1.0, 1.0], "svd", None), "needs a rank of 1 or more"),
        (([1.0, 1.0], "svd", 0), "needs a rank of 1 or more"),
        (([1.0, 1.0], "cat", 8), "takes no rank"),
    ],
)
def test_fuse_plan_that_does_not_fit_is_refused(arguments, words: str) -> None:
    weights, rule, rank = arguments
    with pytest.raises(BadInput, match=words):
        fuse([random_adapter(1), random_adapter(2)], weights, rule, rank)


def test_fuse_no_adapter_is_refused() -> None:
    with pytest.raises(BadInput, match="no adapter is given"):
        fuse([], [])


def test_fuse_other_shape_is_refused_naming_module_and_adapters() -> None:
    other = random_adapter(2, shapes={Q: (12, 11)})
    with pytest.raises(BadInput, match=rf"second: module '{Q}' is 12 x 11 but 12 x 10 in first"):
        fuse([random_adapter(1), other], [1.0, 1.0], names=["first", "second"])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_fuse_not_finite_weights_are_refused_naming_the_module(poison: float) -> None:
    adapter = random_adapter(1)
    adapter.factors[V][1][2, 1] = poison
    with pytest.raises(BadInput, match=rf"adapter 2: module '{V}' holds NaN or Inf"):
        fuse([random_adapter(2), adapter], [1.0, 1.0])


def test_rules_every_row_has_words_and_a_source() -> None:
    for name, rule in RULES.items():
        assert rule.words, name
        assert rule.apply.__doc__, name
