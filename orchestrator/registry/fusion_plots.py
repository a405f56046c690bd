"""Pictures of a fusion: how alike its adapters are, its spectrum, and what the trials of its search keep."""

# matplotlib leaves its keyword arguments and paths untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.registry.plots import ACCENT, INK, PALE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK = 0.6
"""Cosine from which on the map's colour wants white letters."""


def fusion_plots(report: Mapping[str, Any], folder: Path) -> None:
    """Write what the report has figures for into an existing folder."""
    if report.get("cosines"):
        similarity(report["cosines"]).savefig(folder / "similarity.png", dpi=120)
    if report.get("spectrum"):
        spectrum(report["spectrum"], report["summary"]["effective_rank"]).savefig(
            folder / "spectrum.png", dpi=120
        )
    search = report.get("search")
    if search and search["trials"]:
        pareto(search).savefig(folder / "pareto.png", dpi=120)


def similarity(cosines: Sequence[Sequence[float]]) -> Figure:
    """Cosine of every two adapters' deltas, in the order of the plan."""
    from matplotlib.figure import Figure

    size = len(cosines)
    figure = Figure(figsize=(1.6 + 0.6 * size, 1.4 + 0.6 * size), layout="constrained")
    figure.suptitle("cosine of the adapters' deltas", color=INK, fontsize=11)
    panel = figure.subplots()
    panel.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [f"{i + 1}" for i in range(size)]
    panel.set_xticks(range(size), labels)
    panel.set_yticks(range(size), labels)
    for i, row in enumerate(cosines):
        for j, cosine in enumerate(row):
            colour = "white" if abs(cosine) > DARK else INK
            panel.text(j, i, f"{cosine:.2f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def spectrum(values: Sequence[float], effective_rank: float) -> Figure:
    """Singular values of the result, all modules together, against their place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    figure.suptitle(f"spectrum; effective rank {effective_rank:.1f} a module", color=INK, fontsize=11)
    panel = figure.subplots()
    panel.plot(range(1, len(values) + 1), values, color=ACCENT, marker=".")
    panel.set_yscale("log" if all(value > 0 for value in values) else "linear")
    panel.set_xlabel("singular value", color=INK, fontsize=9)
    panel.tick_params(colors=INK, labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


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
