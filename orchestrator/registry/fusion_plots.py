"""Pictures of a fusion: what the trials of its search keep of each parent, task against task."""

# matplotlib leaves its keyword arguments and paths untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.registry.plots import ACCENT, INK, PALE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fusion_plots(report: Mapping[str, Any], folder: Path) -> None:
    """Write what the report has figures for into an existing folder."""
    search = report.get("search")
    if search and search["trials"]:
        pareto(search).savefig(folder / "pareto.png", dpi=120)


def pareto(search: Mapping[str, Any]) -> Figure:
    """A panel for every two tasks: what each trial keeps of their parents, and the floors as lines.

    Filled points are those that no other trial beats on all tasks together; the star was chosen.
    """
    from matplotlib.figure import Figure

    keys = list(search["floors"])
    pairs = list(combinations(keys, 2)) or [(keys[0], keys[0])]
    figure = Figure(figsize=(3.6 * len(pairs) + 0.4, 3.9), layout="constrained")
    figure.suptitle(f"{len(search['trials'])} trials: share of the parents' scores", color=INK, fontsize=11)
    for panel, (across, up) in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
        for trial in search["trials"]:
            kept = trial["retention"]
            face = ACCENT if trial["pareto"] else "none"
            panel.scatter(kept[across], kept[up], s=28, facecolors=face, edgecolors=ACCENT, linewidths=0.9)
        chosen = search["trials"][search["best"]]["retention"]
        panel.scatter(chosen[across], chosen[up], marker="*", s=170, color=INK, zorder=3)
        panel.axvline(search["floors"][across], color=PALE, zorder=0)
        panel.axhline(search["floors"][up], color=PALE, zorder=0)
        panel.set_xlabel(across, color=INK, fontsize=9)
        panel.set_ylabel(up, color=INK, fontsize=9)
        panel.tick_params(colors=INK, labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
