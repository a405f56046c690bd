"""What computes each rule of the table in `workers.rules`."""

from __future__ import annotations

from workers.fuse.breadcrumbs import breadcrumbs
from workers.fuse.cat import cat
from workers.fuse.core import core
from workers.fuse.dare import dare, dare_ties, dare_ties_mergekit, dare_ties_peft
from workers.fuse.della import della, della_linear, della_mergekit
from workers.fuse.iso import iso_c, iso_c_paper, iso_cts
from workers.fuse.random import random
from workers.fuse.regmean import regmean
from workers.fuse.rule import Apply, Rule, Turns
from workers.fuse.spaces import in_core, in_knots, on_dense
from workers.fuse.ties import ties, ties_mergekit, ties_peft
from workers.fuse.tsv import tsv
from workers.rules import ROWS

_APPLY: dict[str, Apply] = {
    "cat": cat,
    "svd": cat,
    "core": core,
    "ties": in_core(ties),
    "ties_peft": in_core(ties_peft),
    "ties_mergekit": in_core(ties_mergekit),
    "ties_dense": on_dense(ties),
    "dare": in_core(dare),
    "dare_ties": in_core(dare_ties),
    "dare_ties_peft": in_core(dare_ties_peft),
    "dare_ties_mergekit": in_core(dare_ties_mergekit),
    "dare_dense": on_dense(dare),
    "della": in_core(della),
    "della_linear": in_core(della_linear),
    "della_mergekit": in_core(della_mergekit),
    "della_dense": on_dense(della),
    "breadcrumbs": in_core(breadcrumbs),
    "breadcrumbs_dense": on_dense(breadcrumbs),
    "knots": in_knots(ties),
    "knots_dare": in_knots(dare),
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_c_paper": iso_c_paper,
    "iso_cts": iso_cts,
    "regmean": regmean,
    "random": random,
}
_TURNS: dict[str, Turns] = {
    # Entries or sizes of the whole module.
    **dict.fromkeys(("ties_dense", "dare_dense", "della_dense", "breadcrumbs_dense"), "none"),
    "random": "none",
    # Entries of the right space; inputs.
    **dict.fromkeys(("knots", "knots_dare", "regmean"), "left"),
}
RULES: dict[str, Rule] = {
    name: Rule(_APPLY[name], row, _TURNS.get(name, "both")) for name, row in ROWS.items()
}
