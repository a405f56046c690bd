"""Structural gates: what must hold of an adapter's files, whatever it scores. Pure.

Owns the table of checks and the words of a finding. The files are read by `workers.outline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from orchestrator.gate import Finding
from workers.outline import Outline, Shape, served_scale
from workers.rules import BUCKETS

Check = Literal[
    "digest", "loadable", "finite", "shapes", "unit_scale", "bucket", "vllm", "sglang", "llama_cpp"
]
CHECKS: tuple[Check, ...] = get_args(Check)
ALWAYS: tuple[Check, ...] = ("digest", "loadable", "finite")
"""Asked of every version."""
OF_FUSIONS: tuple[Check, ...] = (*ALWAYS, "unit_scale")
"""Asked of every version that was fused: a fusion folds its parents' scales in."""
SERVERS = {"vllm": "vLLM", "sglang": "SGLang", "llama_cpp": "llama.cpp"}
REQUIRED: dict[str, str] = {
    "digest": "the bytes that were registered",
    "loadable": "plain LoRA in two whole files, without DoRA, bias or modules_to_save",
    "finite": "no NaN and no infinity",
    "shapes": "linear layers of the base, in its shapes",
    "unit_scale": "lora_alpha equal to the rank in every module, without rsLoRA",
    "bucket": f"a rank that is a bucket of vLLM ({', '.join(map(str, BUCKETS))})",
    "vllm": "scaled by vLLM as it was scored, at a rank it takes",
    "sglang": "scaled by SGLang as it was scored",
    "llama_cpp": "scaled by llama.cpp as it was scored",
}
CLOSE = 1e-6


@dataclass(frozen=True)
class Structure:
    """What was found of a version's files."""

    outline: Outline
    altered: str = ""
    """Why its bytes are not those that were registered; empty if they are."""
    base: Mapping[str, Shape] | None = None
    """Module -> shape of the base's weight; None where the base is not at hand."""


def wanted(asked: Collection[str], fused: bool) -> tuple[str, ...]:
    """What is asked for, and what always is, in the order of the table."""
    always = OF_FUSIONS if fused else ALWAYS
    return tuple(check for check in CHECKS if check in asked or check in always)


def findings(asked: Sequence[str], found: Structure) -> Iterator[Finding]:
    """One a check; of what cannot be loaded nothing else is told."""
    for check in asked:
        if found.outline.problem and check not in ("digest", "loadable"):
            continue
        why = _PROBLEMS[check](found)
        words = f"structure: {check}" + (
            f" is required to be {REQUIRED[check]}, but {why}" if why else " holds"
        )
        yield Finding(f"structure.{check}", REQUIRED[check], None, math.nan if why else 0.0, not why, words)


def unknown_check(name: object) -> str | None:
    """Why `name` is no structural check, naming the nearest, or None."""
    if name in CHECKS:
        return None
    near = get_close_matches(str(name), CHECKS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(CHECKS)}"
    return f"{name!r} is no structural check; {hint}"


# ---- the checks: why one does not hold, empty if it does ------------------------------------------------


def _finite(found: Structure) -> str:
    name = found.outline.not_finite
    return f"tensor '{name}' holds NaN or Inf" if name else ""


def _shapes(found: Structure) -> str:
    if found.base is None:
        return "its base is not known here; run the command in the home that trained on it"
    for name, shape in found.outline.shapes.items():
        theirs = found.base.get(name)
        if theirs is None:
            return f"the base has no module '{name}'"
        if theirs != shape:
            return f"module '{name}' is of {list(shape)} and the base's of {list(theirs)}"
    return ""


def _unit_scale(found: Structure) -> str:
    if found.outline.use_rslora:
        return "use_rslora is set"
    other = [(name, scale) for name, scale in found.outline.scales.items() if not _equal(scale, 1.0)]
    return f"module '{other[0][0]}' is scaled by {other[0][1]:.4g}" if other else ""


def _bucket(found: Structure) -> str:
    rank = _rank(found.outline)
    return "" if rank in BUCKETS else f"its rank is {rank}"


def _vllm(found: Structure) -> str:
    rank = _rank(found.outline)
    return (
        f"its rank is {rank}, and vLLM takes at most {BUCKETS[-1]}"
        if rank > BUCKETS[-1]
        else _served("vLLM")(found)
    )


def _served(server: str) -> Callable[[Structure], str]:
    def why(found: Structure) -> str:
        seen = found.outline
        for name, rank in seen.ranks.items():
            theirs = served_scale(server, seen.lora_alpha, seen.r, rank, seen.use_rslora)
            if not _equal(theirs, seen.scales[name]):
                return f"it would scale module '{name}' by {theirs:.4g}, not by {seen.scales[name]:.4g}"
        return ""

    return why


def _rank(seen: Outline) -> int:
    return max(seen.r, *seen.ranks.values())


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE)


_PROBLEMS: dict[str, Callable[[Structure], str]] = {
    "digest": lambda found: found.altered,
    "loadable": lambda found: found.outline.problem,
    "finite": _finite,
    "shapes": _shapes,
    "unit_scale": _unit_scale,
    "bucket": _bucket,
    "vllm": _vllm,
    "sglang": _served("SGLang"),
    "llama_cpp": _served("llama.cpp"),
}
