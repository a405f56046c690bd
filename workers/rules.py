"""The table of fusion rules: what each one is, which options it takes, which laws it claims. No arithmetic.

Read by recipes, which refuse a plan before anything runs, and by `workers.fuse`, which computes. A new rule
is one line here, one small file under `fuse/` and its name in `fuse/rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Literal

from workers.types import BadInput, RuleOptions

Cut = Literal["needed", "allowed", "refused"]
Law = Literal["identity", "linear", "permutation", "scaling", "folding"]

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`: memory is set aside for the whole bucket."""
CUTS = ("energy", "bucket")
ALL: frozenset[Law] = frozenset({"identity", "linear", "permutation", "scaling", "folding"})
SCALES: frozenset[Law] = frozenset({"identity", "permutation", "scaling", "folding"})
SEEDED: frozenset[Law] = frozenset({"identity", "linear", "scaling", "folding"})
"""A drawn mask belongs to a place in the list of adapters, so another order is another draw."""
SEEDED_SIGNS: frozenset[Law] = frozenset({"identity", "scaling", "folding"})
MEANS: frozenset[Law] = frozenset({"identity", "permutation", "folding"})
"""Divided by the weights: twice the weights is the same adapter."""
SEEDED_MEANS: frozenset[Law] = frozenset({"identity", "folding"})
FLAT: frozenset[Law] = frozenset({"permutation", "scaling", "folding"})
"""The spectrum is levelled, also that of a single adapter."""


@dataclass(frozen=True)
class Row:
    """What a plan may say to a rule, and what may be expected of it.

    `cut`: whether the result is cut to a rank, an energy or a bucket. `laws` hold at density 1, where a rule
    has a density; `linear` is meant in the weights.
    """

    words: str
    cut: Cut
    laws: frozenset[Law]
    options: tuple[str, ...] = ()
    divides: bool = False
    """By the weights, which are shares then: none below 0."""

    @property
    def takes_rank(self) -> bool:
        return self.cut == "needed"


DENSITY, DRAWN = ("density", "scale"), ("density", "seed", "scale")
ROWS: dict[str, Row] = {
    "cat": Row("exact weighted sum, at the sum of the ranks", "refused", ALL),
    "svd": Row("best approximation of the weighted sum at a rank", "needed", SCALES),
    "core": Row("exact weighted sum, at the rank it has", "allowed", ALL),
    "ties": Row("trim, elect signs by weighted mass, mean of those that agree", "allowed", SCALES, DENSITY),
    "ties_peft": Row("ties; signs by unweighted mass, divided by count", "allowed", SCALES, DENSITY),
    "ties_mergekit": Row("ties; signs by weighted mass, divided by weights", "allowed", MEANS, DENSITY,
                         divides=True),
    "ties_dense": Row("ties on whole matrices: slow, an oracle", "needed", SCALES, DENSITY),
    "dare": Row("drop entries at random, rescale, add", "allowed", SEEDED, DRAWN),
    "dare_ties": Row("drop at random, rescale, then as ties", "allowed", SEEDED_SIGNS, DRAWN),
    "dare_ties_peft": Row("dare_ties; signs by unweighted mass", "allowed", SEEDED_SIGNS, DRAWN),
    "dare_ties_mergekit": Row("dare_ties; what agrees is added", "allowed", SEEDED_SIGNS, DRAWN),
    "dare_dense": Row("dare on whole matrices: slow, an oracle", "needed", SEEDED_SIGNS, DRAWN),
    "della": Row("drop small entries oftener, rescale, then as ties", "allowed", SEEDED_SIGNS,
                 (*DRAWN, "epsilon")),
    "della_linear": Row("drop small entries oftener, rescale, add", "allowed", SEEDED, (*DRAWN, "epsilon")),
    "della_mergekit": Row("della; same l1 norm, divided by weights", "allowed", SEEDED_MEANS,
                          (*DRAWN, "epsilon"), divides=True),
    "della_dense": Row("della on whole matrices: slow, an oracle", "needed", SEEDED_SIGNS,
                       (*DRAWN, "epsilon")),
    "breadcrumbs": Row("drop the largest and the smallest entries, add", "allowed", ALL, (*DENSITY, "gamma")),
    "breadcrumbs_dense": Row("breadcrumbs on whole matrices: slow, an oracle", "needed", SCALES,
                             (*DENSITY, "gamma")),
    "knots": Row("ties in the shared right space of all adapters", "allowed", SCALES, DENSITY),
    "knots_dare": Row("dare in the shared right space of all adapters", "allowed", SEEDED, DRAWN),
    "tsv": Row("singular vectors made orthogonal over all adapters", "allowed", SCALES, ("scale",)),
    "iso_c": Row("weighted sum with a flat spectrum, mean over its rank", "allowed", FLAT, ("scale",)),
    "iso_c_paper": Row("iso_c with the mean over the whole matrix's rank", "allowed", FLAT, ("scale",)),
    "iso_cts": Row("flat spectrum, with each adapter's own directions kept", "allowed", FLAT,
                   ("common", "scale")),
    "regmean": Row("least squares over own inputs; needs gram.safetensors", "allowed", MEANS,
                   ("alpha", "scale"), divides=True),
    "random": Row("a control: random, of the weighted sum's norms", "refused", frozenset()),
}  # fmt: skip
MERGES = tuple(name for name in ROWS if name != "random")
"""What a user may ask for; the control is planned beside it."""


def check_plan(name: str, rank: int | None, options: RuleOptions) -> Row:
    """The row of `name`, if rank and options fit it. Raises BadInput with what to write instead."""
    check_name(name, ROWS)
    row = ROWS[name]
    _check_cut(name, row, rank, options)
    _check_taken(name, row, options)
    _check_ranges(options)
    return row


def check_name(name: str, known: Collection[str]) -> None:
    """Raises BadInput with the nearest of the known names."""
    if name not in known:
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise BadInput(f"rule '{name}' is unknown; did you mean '{nearest}'? ({', '.join(known)})")


def check_weights(name: str, weights: Sequence[float], adapters: int) -> None:
    """Raises BadInput unless there is one finite weight an adapter, and none below 0 where it is a share."""
    if adapters == 0:
        raise BadInput("no adapter is given; name at least one")
    if len(weights) != adapters:
        raise BadInput(f"{len(weights)} weights for {adapters} adapters; give one weight an adapter")
    for weight in weights:
        if not math.isfinite(weight):
            raise BadInput(f"weight {weight} is not a finite number")
    if ROWS[name].divides and (min(weights) < 0 or sum(weights) == 0):
        raise BadInput(f"rule '{name}' divides by the weights; give weights of 0 or more, not all 0")


def _check_cut(name: str, row: Row, rank: int | None, options: RuleOptions) -> None:
    given = [
        key for key, value in (("rank", rank), *_set(options)) if key in ("rank", *CUTS) and value is not None
    ]
    if (row.cut == "needed" and not given) or (rank is not None and rank < 1 and row.cut != "refused"):
        raise BadInput(f"rule '{name}' needs a rank of 1 or more (or an energy or a bucket), not {rank}")
    if row.cut == "refused" and given:
        said = f"rank: {rank}" if rank is not None else given[0]
        raise BadInput(f"rule '{name}' takes no rank; leave out {said}, or use rule 'svd'")
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} are two ways to cut; give one")


def _check_taken(name: str, row: Row, options: RuleOptions) -> None:
    for key, _ in _set(options):
        if key not in (*CUTS, *row.options):
            takes = ", ".join(row.options) or "none"
            raise BadInput(f"rule '{name}' takes no {key}; leave it out (it takes {takes})")


def _check_ranges(options: RuleOptions) -> None:
    for key in ("density", "energy"):
        value = getattr(options, key)
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"{key} is {value}; it must be above 0 and at most 1")
    for key in ("gamma", "epsilon", "common", "alpha"):
        value = getattr(options, key)
        if value is not None and not 0 <= value <= 1:
            raise BadInput(f"{key} is {value}; it must be from 0 to 1")
    if options.bucket is not None and options.bucket not in BUCKETS:
        nearest = min(BUCKETS, key=lambda bucket: abs(bucket - (options.bucket or 0)))
        raise BadInput(f"vLLM has no bucket {options.bucket}; the nearest is {nearest} ({BUCKETS})")
    if options.scale is not None and not math.isfinite(options.scale):
        raise BadInput(f"scale {options.scale} is not a finite number")
    if options.seed is not None and options.seed < 0:
        raise BadInput(f"seed is {options.seed}; it must be 0 or more")
    density, gamma = options.density or 0.5, options.gamma or 0.0
    if density + gamma > 1:
        raise BadInput(f"density {density} and gamma {gamma} are together more than all entries")


def _set(options: RuleOptions) -> list[tuple[str, float | int]]:
    found = [(field.name, getattr(options, field.name)) for field in fields(options)]
    return [(key, value) for key, value in found if value is not None]


def as_given(options: RuleOptions) -> dict[str, float | int]:
    """Only what was set: an option that comes later changes no id of an older plan."""
    return dict(_set(options))


def options_of(settings: Sequence[str]) -> RuleOptions:
    """Options from words like density=0.2. Raises BadInput naming the one that is unknown or no figure."""
    kinds = {field.name: int if "int" in str(field.type) else float for field in fields(RuleOptions)}
    found: dict[str, float] = {}
    for key, _, text in (setting.partition("=") for setting in settings):
        if key not in kinds:
            raise BadInput(f"'{key}' is no option of a rule; there are {', '.join(kinds)}")
        try:
            found[key] = kinds[key](text)
        except ValueError:
            raise BadInput(f"{key} is '{text}'; give it as {key}=FIGURE") from None
    return RuleOptions(**found)  # pyright: ignore[reportArgumentType] - of the kinds of its fields
