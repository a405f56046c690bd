"""The table of fusion rules, and the check of a plan against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches

from workers.fuse.cat import cat
from workers.fuse.random import random
from workers.fuse.rule import Options, Rule
from workers.fuse.svd import truncated_svd
from workers.types import BadInput

RULES: dict[str, Rule] = {
    "cat": Rule(cat, takes_rank=False, words="exact weighted sum, at the sum of the ranks"),
    "random": Rule(random, takes_rank=False, words="a control: random, of the weighted sum's norms"),
    "svd": Rule(truncated_svd, takes_rank=True, words="best approximation of the weighted sum at a rank"),
}


def checked_rule(name: str, options: Options, weights: Sequence[float], adapters: int) -> Rule:
    """The row of `name`, if the plan fits it. Raises BadInput with what to write instead."""
    if name not in RULES:
        nearest = get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
        raise BadInput(f"fuse: rule '{name}' is unknown; did you mean '{nearest}'? ({', '.join(RULES)})")
    if adapters == 0:
        raise BadInput("fuse: no adapter is given; name at least one")
    if len(weights) != adapters:
        raise BadInput(f"fuse: {len(weights)} weights for {adapters} adapters; give one weight an adapter")
    for weight in weights:
        if not math.isfinite(weight):
            raise BadInput(f"fuse: weight {weight} is not a finite number")
    _check_rank(name, options.rank)
    return RULES[name]


def _check_rank(name: str, rank: int | None) -> None:
    takes_rank = RULES[name].takes_rank
    if takes_rank and (rank is None or rank < 1):
        raise BadInput(f"fuse: rule '{name}' needs a rank of 1 or more, not {rank}")
    if not takes_rank and rank is not None:
        raise BadInput(f"fuse: rule '{name}' takes no rank; leave out rank: {rank}, or use rule 'svd'")
