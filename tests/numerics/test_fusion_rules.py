"""Each rule against numbers worked out by hand, the installed PEFT, or a paper's formula in full matrices."""

from __future__ import annotations

import math
from pathlib import Path

import peft.utils.merge_utils as peft
import pytest
import torch
from torch import Tensor

from tests.adapters import SHAPES, dense, dense_sum, random_adapter, relative_error
from workers.adapter import Adapter
from workers.fuse import fuse
from workers.fuse.breadcrumbs import breadcrumbs
from workers.fuse.dare import dare, dare_ties_mergekit, dare_ties_peft, drawn
from workers.fuse.della import chances, della_mergekit
from workers.fuse.grams import GRAMS
from workers.fuse.largest import largest, places
from workers.fuse.normal import modules
from workers.fuse.rule import Merge, Options
from workers.fuse.shared import shared
from workers.fuse.spaces import knots_space, on_dense
from workers.fuse.ties import ties, ties_mergekit, ties_peft, trimmed
from workers.rules import BUCKETS, options_of
from workers.tensors import save_tensors
from workers.types import BadInput, RuleOptions

EXACT = 1e-12
FLOAT32 = 1e-6
Q, V, DOWN = SHAPES
WEIGHTS = (1.0, 0.5, 0.7)


@pytest.fixture
def parts() -> list[Adapter]:
    """Of different ranks, scalings and modules."""
    some = {name: SHAPES[name] for name in (Q, DOWN)}
    return [
        random_adapter(1, r=2, lora_alpha=5),
        random_adapter(2, r=3, use_rslora=True),
        random_adapter(3, r=1, shapes=some),
    ]


def merged(rule: str, parts: list[Adapter], **settings: object) -> dict[str, Tensor]:
    folders = settings.pop("folders", ())
    fused, _ = fuse(parts, WEIGHTS[: len(parts)], rule, options=RuleOptions(**settings), folders=folders)  # type: ignore[arg-type]
    return {name: dense(fused, name) for name in fused.factors}


# ---- entry by entry, by hand ------------------------------------------------------------------------------

# Three adapters of six entries. At density 0.5 the three largest of each stay:
#   [ 4, -3,  0,  2,  0,  0]
#   [-1,  0,  2,  3,  0,  0]
#   [ 0, -5,  0, -6,  0,  1]
DELTAS = torch.tensor(
    [[4.0, -3, 1, 2, 0, 0], [-1, 0, 2, 3, 0.5, 0], [0, -5, 0.5, -6, 0, 1]], dtype=torch.float64
)
UNEQUAL = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # w delta: [4, -3, 0, 2, ..], [-2, 0, 4, 6, ..], [0, -2.5, 0, -3, 0, .5]: signs + - + + 0 +.
        (ties, [4, -2.75, 4, 4, 0, 0.5]),
        # Unweighted sums 3, -8, 2, -1: the fourth sign is -, and only the third adapter has it.
        (ties_peft, [4, -2.75, 4, -3, 0, 0.5]),
        # As the first, divided by the weights of those that agree: 1, 1.5, 2, 3, -, 0.5.
        (ties_mergekit, [4, -5.5 / 1.5, 2, 8 / 3, 0, 1]),
    ],
)
def test_ties_three_readings_give_the_vectors_worked_out_by_hand(rule: Merge, expected: list[float]) -> None:
    found = rule(DELTAS, UNEQUAL, Options(density=0.5), 0)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=EXACT)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 7, 11, 12])
def test_largest_picks_so_many_entries_and_of_equal_ones_the_first(count: int) -> None:
    values = torch.tensor([[[1.0, -3, 2, 3], [0, 2, -2, 0], [2, 1, 0, -2]]] * 2, dtype=torch.float64)
    values[1] = -values[1].flip(0)
    found = largest(values, count)
    for value, mask in zip(values, found, strict=True):
        flat = value.abs().flatten().tolist()
        order = sorted(range(12), key=lambda place: (-flat[place], place))
        assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_places_are_those_of_a_stable_order_of_magnitudes(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    plain = torch.randn(2, 100, count, generator=generator, dtype=torch.float64)
    twins = plain.clone()  # rows in which entries differ in nothing, or in the last bit of a double
    twins[0, 3, count // 2 :] = twins[0, 3, 0]
    twins[1, 70, -1] = -torch.nextafter(twins[1, 70, 0], torch.tensor(torch.inf, dtype=torch.float64))
    for deltas in (plain, twins, plain.float()):
        order = deltas.abs().argsort(dim=-1, stable=True)
        assert torch.equal(places(deltas), order.argsort(dim=-1))


def test_trimmed_keeps_the_share_of_entries_that_a_full_order_would() -> None:
    deltas = torch.randn(3, 31, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = trimmed(deltas, 0.3)
    order = deltas.abs().flatten(1).argsort(dim=1, descending=True)[:, : int(0.3 * 31 * 17)]
    exact = torch.zeros(3, 31 * 17, dtype=torch.float64).scatter(1, order, deltas.flatten(1).gather(1, order))
    assert torch.equal(found.flatten(1), exact)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.77])
def test_ties_peft_gives_what_the_installed_peft_gives(density: float) -> None:
    deltas = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    expected = peft.ties(list(deltas), weights, density)
    assert torch.allclose(ties_peft(deltas, weights, Options(density=density), 0), expected, atol=EXACT)


def test_dare_keeps_the_drawn_entries_and_divides_them_by_the_density() -> None:
    mask = drawn(DELTAS, 0.25, seed=7)
    assert 0 < int(mask.sum()) < mask.numel()
    found = dare(DELTAS, UNEQUAL, Options(density=0.25), 7)
    assert torch.allclose(found, (UNEQUAL[:, None] * DELTAS * mask).sum(0) / 0.25, atol=EXACT)
    assert torch.equal(found, dare(DELTAS, UNEQUAL, Options(density=0.25), 7))
    assert not torch.equal(found, dare(DELTAS, UNEQUAL, Options(density=0.25), 8))


def test_dare_expectation_over_seeds_is_the_plain_sum() -> None:
    mean = torch.stack([dare(DELTAS, UNEQUAL, Options(density=0.5), seed) for seed in range(4000)]).mean(0)
    exact = UNEQUAL @ DELTAS
    # Standard error of an entry: sqrt(sum_i (w_i d_i)^2 / 4000), below 0.13 for every one of these.
    assert float((mean - exact).abs().max()) < 5 * 0.13


def test_dare_ties_at_density_one_differ_by_who_elects_and_what_divides() -> None:
    options = Options(density=1.0)
    by_count = dare_ties_peft(DELTAS, UNEQUAL, options, 0)
    # Sums 3, -8, 3.5, -1, 0.5, 1 elect + - + - + +; the third entry is (1 + 4 + 0.25) / 3.
    assert torch.allclose(
        by_count, torch.tensor([4, -2.75, 1.75, -3, 1, 0.5], dtype=torch.float64), atol=EXACT
    )
    added = dare_ties_mergekit(DELTAS, UNEQUAL, options, 0)
    assert torch.allclose(added, torch.tensor([4, -5.5, 5.25, 8, 1, 0.5], dtype=torch.float64), atol=EXACT)


def test_della_chance_rises_with_the_magnitude_within_a_row() -> None:
    rows = torch.tensor([[[3.0, -1, 2], [0.1, 0.2, -9]]], dtype=torch.float64)
    found = chances(rows, density=0.6, spread=0.2)
    expected = torch.tensor([[[0.7, 0.5, 0.6], [0.5, 0.6, 0.7]]], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=EXACT)
    assert torch.equal(chances(rows, density=1.0, spread=0.2), torch.ones_like(rows))


def test_della_mergekit_keeps_the_l1_norm_of_a_single_adapter() -> None:
    delta = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = della_mergekit(delta, torch.ones(1, dtype=torch.float64), Options(density=0.5, epsilon=0.2), 3)
    assert 0 < int((found == 0).sum()) < 64
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-12)


def test_breadcrumbs_drops_the_outliers_and_the_noise() -> None:
    row = torch.tensor([[10.0, -9, 8, 7, 6, 5, -4, 3, 2, 1]], dtype=torch.float64)
    found = breadcrumbs(row, torch.ones(1, dtype=torch.float64), Options(density=0.5, gamma=0.2), 0)
    assert found.tolist() == [0, 0, 8, 7, 6, 5, -4, 0, 0, 0]


# ---- spaces -----------------------------------------------------------------------------------------------


def test_core_space_holds_every_delta_without_loss(parts: list[Adapter]) -> None:
    for module in modules(parts, WEIGHTS, ["a", "b", "c"]):
        space = shared(module)
        for middle, adapter in zip(space.middles, parts, strict=True):
            exact = dense(adapter, module.name)
            back = space.left @ middle @ space.right.T
            assert float((back - exact).abs().max()) < 1e-10


def test_knots_space_is_the_dense_svd_of_the_concatenation(parts: list[Adapter]) -> None:
    for module in modules(parts, WEIGHTS, ["a", "b", "c"]):
        left, rights = knots_space(module)
        wide = torch.cat([dense(adapter, module.name) for adapter in parts], dim=1)
        values = torch.linalg.svdvals(wide)[: left.shape[1]]
        assert torch.allclose(torch.linalg.vector_norm(left, dim=0), values, rtol=1e-10)
        for right, adapter in zip(rights, parts, strict=True):
            assert torch.allclose(left @ right, dense(adapter, module.name), atol=1e-10)
        flat = torch.cat(list(rights), dim=1)
        assert torch.allclose(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), atol=1e-10)


def test_knots_agrees_with_ties_on_the_dense_right_singular_vectors(parts: list[Adapter]) -> None:
    found = merged("knots", parts, density=0.4)
    for name in SHAPES:
        whole = [dense(adapter, name) for adapter in parts]
        u, s, vh = torch.linalg.svd(torch.cat(whole, dim=1), full_matrices=False)
        rank = int((s > 1e-10 * s[0]).sum())
        rights = torch.stack(vh[:rank].split(whole[0].shape[1], dim=1))
        best = ties(rights, torch.tensor(WEIGHTS, dtype=torch.float64), Options(density=0.4), 0)
        assert relative_error(found[name], (u[:, :rank] * s[:rank]) @ best) < FLOAT32


def test_dense_oracle_works_on_the_entries_of_the_whole_deltas(parts: list[Adapter]) -> None:
    options = RuleOptions(density=0.3)
    fused, _ = fuse(parts, WEIGHTS, "ties_dense", 10, options=options)
    for name in SHAPES:
        whole = torch.stack([dense(adapter, name) for adapter in parts])
        exact = ties(whole, torch.tensor(WEIGHTS, dtype=torch.float64), Options(density=0.3), 0)
        assert relative_error(dense(fused, name), exact) < FLOAT32
    module = next(iter(modules(parts, WEIGHTS, ["a", "b", "c"])))
    a, b = on_dense(ties_peft)(module, Options(density=0.3))
    whole = [dense(adapter, module.name) for adapter in parts]
    assert torch.allclose(
        b @ a, peft.ties(whole, torch.tensor(WEIGHTS, dtype=torch.float64), 0.3), atol=1e-10
    )


# ---- rules of the spectrum, against the papers on whole matrices ------------------------------------------


def orthogonal(columns: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    return u @ vh


def dense_tsv(whole: list[Tensor], ranks: list[int]) -> Tensor:
    us, ss, vs = [], [], []
    for delta, rank, weight in zip(whole, ranks, WEIGHTS, strict=True):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :rank])
        ss.append(weight * s[:rank])
        vs.append(vh[:rank].T)
    u, v = orthogonal(torch.cat(us, dim=1)), orthogonal(torch.cat(vs, dim=1))
    return u @ torch.diag(torch.cat(ss)) @ v.T


def dense_iso(whole: list[Tensor], over: int | None) -> Tensor:
    total = sum((w * d for w, d in zip(WEIGHTS, whole, strict=True)), torch.zeros_like(whole[0]))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    return float(s.sum()) / (over or rank) * u[:, :rank] @ vh[:rank]


def test_tsv_agrees_with_algorithm_1_on_whole_matrices(parts: list[Adapter]) -> None:
    found = merged("tsv", parts)
    for name in SHAPES:
        ranks = [len(adapter.factors[name][0]) if name in adapter.factors else 0 for adapter in parts]
        exact = dense_tsv([dense(adapter, name) for adapter in parts], ranks)
        assert relative_error(found[name], exact) < FLOAT32


def test_iso_c_means_over_the_rank_and_the_paper_over_the_whole_matrix(parts: list[Adapter]) -> None:
    own, letter = merged("iso_c", parts), merged("iso_c_paper", parts)
    for name, shape in SHAPES.items():
        whole = [dense(adapter, name) for adapter in parts]
        full_rank = min(shape)
        assert relative_error(own[name], dense_iso(whole, None)) < FLOAT32
        assert relative_error(letter[name], dense_iso(whole, full_rank)) < FLOAT32


def test_iso_cts_agrees_with_algorithm_2_where_the_joint_rank_is_full() -> None:
    """Three adapters of rank 4 span a 12 x 12 module: core space is then the whole one."""
    shapes = {"m": (12, 12)}
    parts = [random_adapter(seed, r=4, shapes=shapes) for seed in range(3)]
    fused, _ = fuse(parts, WEIGHTS, "iso_cts", options=RuleOptions(common=0.5))
    a, b = fused.factors["m"]
    whole = [
        w * (part.factors["m"][1] @ part.factors["m"][0]).double()
        for w, part in zip(WEIGHTS, parts, strict=True)
    ]
    u, s, vh = torch.linalg.svd(sum(whole[1:], whole[0]), full_matrices=False)
    us, ss, vs = [u[:, :6]], [s[:6]], [vh[:6]]
    for delta in whole:
        u_i, s_i, vh_i = torch.linalg.svd(delta - u[:, :6] @ u[:, :6].T @ delta)
        us, ss, vs = [*us, u_i[:, :2]], [*ss, s_i[:2]], [*vs, vh_i[:2]]
    exact = torch.cat(ss).mean() * orthogonal(torch.cat(us, dim=1)) @ orthogonal(torch.cat(vs).T).T
    assert relative_error((b @ a).double(), exact) < 1e-5


def test_regmean_is_the_least_squares_solution_over_the_adapters_inputs(
    parts: list[Adapter], tmp_path: Path
) -> None:
    two = [parts[0], random_adapter(9, r=3)]
    generator = torch.Generator().manual_seed(5)
    inputs = [
        {n: torch.randn(50, s[1], generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
        for _ in two
    ]
    folders = []
    for i, seen in enumerate(inputs):
        folders.append(tmp_path / str(i))
        folders[i].mkdir()
        save_tensors({name: x.T @ x for name, x in seen.items()}, folders[i] / GRAMS)
    found = merged("regmean", two, alpha=1.0, folders=folders)
    for name in SHAPES:
        x = torch.cat([math.sqrt(w) * seen[name] for w, seen in zip(WEIGHTS, inputs, strict=False)])
        y = torch.cat(
            [
                math.sqrt(w) * seen[name] @ dense(adapter, name).T
                for w, seen, adapter in zip(WEIGHTS, inputs, two, strict=False)
            ]
        )
        exact = torch.linalg.lstsq(x, y).solution.T
        assert relative_error(found[name], exact) < 1e-5


def test_regmean_without_gram_matrices_is_refused_naming_the_module(parts: list[Adapter]) -> None:
    with pytest.raises(BadInput, match=r"inputs of module '.*' of adapter 1: train it with gram_rows"):
        fuse(parts, WEIGHTS, "regmean")


# ---- cutting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["svd", "ties", "knots", "tsv"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_cut_to_an_energy_takes_the_lowest_rank_that_keeps_it(
    parts: list[Adapter], rule: str, energy: float
) -> None:
    whole = merged("cat" if rule == "svd" else rule, parts)
    fused, report = fuse(parts, WEIGHTS, rule, options=RuleOptions(energy=energy))
    for name, exact in whole.items():
        s = torch.linalg.svdvals(exact)
        shares = s.square().cumsum(0) / s.square().sum()
        lowest = 1 + int((shares < energy - 1e-9).sum())
        assert len(fused.factors[name][0]) == lowest
        assert report["modules"][name]["discarded_energy"] ** 2 <= 1 - energy + 1e-9


@pytest.mark.parametrize("bucket", [1, 8])
def test_cut_to_a_bucket_is_no_wider_than_it(parts: list[Adapter], bucket: int) -> None:
    fused, _ = fuse(parts, WEIGHTS, "svd", options=RuleOptions(bucket=bucket))
    assert fused.r <= bucket
    plain, _ = fuse(parts, WEIGHTS, "svd", bucket)
    for name in SHAPES:
        assert torch.equal(fused.factors[name][0], plain.factors[name][0])
    assert BUCKETS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_scale_multiplies_the_result(parts: list[Adapter]) -> None:
    plain, scaled = merged("ties", parts), merged("ties", parts, scale=0.3)
    for name, delta in plain.items():
        assert relative_error(scaled[name], 0.3 * delta) < FLOAT32


def test_core_is_the_exact_sum_at_the_rank_the_adapters_share() -> None:
    one = random_adapter(1, r=3)
    same = Adapter({n: (a, 2 * b) for n, (a, b) in one.factors.items()}, 3, 3)
    fused, _ = fuse([one, same], [1.0, 1.0], "core")
    assert {len(a) for a, _ in fused.factors.values()} == {3}
    for name in SHAPES:
        assert relative_error(dense(fused, name), dense_sum([one, same], [1.0, 1.0], name)) < FLOAT32


def test_options_from_words_are_those_of_a_recipe() -> None:
    assert options_of(["density=0.3", "seed=4"]) == RuleOptions(density=0.3, seed=4)
    with pytest.raises(BadInput, match="'densty' is no option of a rule; there are energy, bucket, density"):
        options_of(["densty=1"])
    with pytest.raises(BadInput, match="seed is 'x'; give it as seed=FIGURE"):
        options_of(["seed=x"])
