"""The laws of fusion, held to PEFT's `add_weighted_adapter` beside ours.

    python -m tests.bench.laws

Worst relative error over some random adapters; a law fails above 1e-4. Ours are held to them on any adapters
by `tests/numerics/test_fusion_laws.py`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.adapters import random_adapter
from tests.bench.__main__ import RESULTS
from tests.bench.record import Bars, Machine, Outcome, Table, Target, write
from workers.adapter import Adapter
from workers.fuse import fuse
from workers.types import RuleOptions

SHAPE = {"layer": (24, 16)}
FAILS = 1e-4
FULL = 16
OURS = {"cat": "cat", "svd": "svd", "linear": "core", "ties": "ties_peft", "ties_svd": "ties_dense"}
OURS |= {"dare_linear": "dare", "dare_linear_svd": "dare_dense", "magnitude_prune": "breadcrumbs"}
OURS |= {"magnitude_prune_svd": "breadcrumbs_dense", "dare_ties": "dare_ties_peft"}
"""PEFT's way to combine -> the rule of ours that stands for it."""

Combine = Callable[..., Tensor]
"""(adapters, weights, density=1.0) -> dense result."""


def peft(kind: str) -> Combine:
    """PEFT's result as a dense matrix; raises what PEFT raises."""

    def combine(parts: Sequence[Adapter], weights: Sequence[float], density: float = 1.0) -> Tensor:
        from peft import LoraConfig, get_peft_model

        m, n = SHAPE["layer"]
        base = torch.nn.ModuleDict({"layer": torch.nn.Linear(n, m, bias=False)})
        model: Any = None
        for i, part in enumerate(parts):
            config = LoraConfig(
                r=part.r, lora_alpha=part.lora_alpha, use_rslora=part.use_rslora, target_modules=["layer"]
            )
            if model is None:
                model = get_peft_model(base, config, adapter_name="0")
            else:
                model.add_adapter(str(i), config)
        layer = model.base_model.model["layer"]
        with torch.no_grad():
            for i, part in enumerate(parts):
                layer.lora_A[str(i)].weight.copy_(part.factors["layer"][0])
                layer.lora_B[str(i)].weight.copy_(part.factors["layer"][1])
        extra = {"density": density} if kind not in ("cat", "svd", "linear") else {}
        cut = {"svd_rank": FULL} if kind.endswith("svd") else {}
        names = [str(i) for i in range(len(parts))]
        model.add_weighted_adapter(names, list(weights), "all", combination_type=kind, **extra, **cut)
        return layer.get_delta_weight("all").detach().double()

    return combine


def ours(rule: str) -> Combine:
    def combine(parts: Sequence[Adapter], weights: Sequence[float], density: float = 1.0) -> Tensor:
        dense = rule.endswith("dense") or rule == "svd"
        takes = rule not in ("cat", "svd", "core")
        options = RuleOptions(
            density=density if takes else None, gamma=0.0 if "breadcrumbs" in rule else None
        )
        fused, _ = fuse(parts, weights, rule, FULL if dense else None, options=options)
        a, b = fused.factors["layer"]
        return (b @ a).double()

    return combine


# ---- laws: (what was found, what should have been) --------------------------------------------------------


def dense(part: Adapter) -> Tensor:
    a, b = part.factors["layer"]
    return part.scaling("layer") * (b.double() @ a.double())


def two(seed: int, **fields: Any) -> list[Adapter]:
    return [random_adapter(seed + i, r=4, lora_alpha=8, shapes=SHAPE, **fields) for i in range(2)]


def folded(part: Adapter) -> Adapter:
    """The same delta with alpha = 1 and scaling in the factors."""
    a, b = part.factors["layer"]
    return Adapter({"layer": (part.scaling("layer") * part.r * a, b)}, part.r, 1.0)


def resplit(part: Adapter) -> Adapter:
    """The same delta from other factors: B R and R^-1 A."""
    a, b = part.factors["layer"]
    turn = torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(len(a))
    return Adapter({"layer": (torch.linalg.solve(turn, a), b @ turn)}, part.r, part.lora_alpha)


def total(parts: Sequence[Adapter], weights: Sequence[float]) -> Tensor:
    return sum((w * dense(p) for p, w in zip(parts, weights, strict=True)), torch.zeros(SHAPE["layer"]))


def mixed(seed: int) -> list[Adapter]:
    return [random_adapter(seed + i, r=2 + i, lora_alpha=8, shapes=SHAPE) for i in range(2)]


Law = Callable[[Combine, int], tuple[Tensor, Tensor]]
LAWS: dict[str, Law] = {
    "identity": lambda f, s: (f(two(s)[:1], [1.0]), dense(two(s)[0])),
    "identity, rsLoRA": lambda f, s: (
        f(two(s, use_rslora=True)[:1], [1.0]),
        dense(two(s, use_rslora=True)[0]),
    ),
    "weighted sum": lambda f, s: (f(two(s), [0.7, 0.4]), total(two(s), [0.7, 0.4])),
    "other ranks": lambda f, s: (f(mixed(s), [0.7, 0.4]), f(mixed(s)[::-1], [0.4, 0.7])),
    "permutation": lambda f, s: (f(two(s), [0.7, 0.4]), f(two(s)[::-1], [0.4, 0.7])),
    "scaling": lambda f, s: (f(two(s), [1.4, 0.8]), 2 * f(two(s), [0.7, 0.4])),
    "folded alpha": lambda f, s: (
        f([folded(part) for part in two(s)], [0.7, 0.4]),
        f(two(s), [0.7, 0.4]),
    ),
    "same twice, density 0.5": lambda f, s: (
        f(two(s), [0.7, 0.4], density=0.5),
        f(two(s), [0.7, 0.4], density=0.5),
    ),
    "other factors": lambda f, s: (
        f([resplit(part) for part in two(s)], [0.7, 0.4]),
        f(two(s), [0.7, 0.4]),
    ),
}
SUMS = ("cat", "svd", "linear", "dare_linear", "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd")
"""Ways to combine that mean a weighted sum at full density."""


def verdict(law: str, kind: str, combine: Combine) -> str:
    if law == "weighted sum" and kind not in SUMS:
        return "-"
    worst = 0.0
    for seed in (10, 20, 30):
        torch.manual_seed(seed)
        try:
            found, expected = LAWS[law](combine, seed)
        except ValueError:
            return "refused"
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return "holds" if worst < FAILS else f"**{worst:.2g}**"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.laws", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    machine = Machine.read()
    warnings.simplefilter("ignore")
    rows, kept = [], {"PEFT": 0, "ours": 0}
    for kind, rule in OURS.items():
        for whose, name, combine in (("PEFT", kind, peft(kind)), ("ours", rule, ours(rule))):
            found = [verdict(law, kind, combine) for law in LAWS]
            rows.append([whose, name, *found])
            kept[whose] += sum(one in ("holds", "-") for one in found)
    targets = [Target("laws that ours keep, of all", kept["ours"] / (len(OURS) * len(LAWS)), 1.0)]
    table = Table("A law holds, or the worst relative error", ("", "combination", *LAWS), rows)
    notes = (
        "Two adapters of rank 4 (rank 2 and 3 for other ranks), 24x16, three seeds, density 1 but where "
        "said, full rank. "
        "Linear and the merges without `_svd` combine A and B apart in PEFT, so that cross terms enter.",
    )
    plot = Bars({whose: float(count) for whose, count in kept.items()}, "laws kept")
    outcome = Outcome("fusion-laws", "Laws of fusion: PEFT and ours", [table], targets, plot, notes)
    command = ["python", "-m", "tests.bench.laws", *arguments]
    print(write(outcome, machine, asked.out, command, small=False).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
