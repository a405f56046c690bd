"""Pictures of an evaluation: metric bars beside the base's, and the confusion matrix.

Owns their looks. Draws on figures of its own, never through pyplot's global state.
"""

# matplotlib leaves its keyword arguments and paths untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.contracts import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE, ACCENT = "#1f2933", "#b8c2cc", "#2563a8"
COLUMNS = 4
BOUNDED = 1.0


def evaluation_plots(score: Scores, base: Scores | None, folder: Path) -> None:
    """Write `metrics.png`, and `confusion.png` for a classification, into an existing folder."""
    metric_bars(score, base).savefig(folder / "metrics.png", dpi=120)
    if score.report.confusion:
        confusion_matrix(score).savefig(folder / "confusion.png", dpi=120)


def metric_bars(score: Scores, base: Scores | None) -> Figure:
    """One small panel a metric, each with a scale of its own: perplexity and F1 share no axis."""
    from matplotlib.figure import Figure

    metrics = score.report.metrics
    columns = min(COLUMNS, max(1, len(metrics)))
    rows = -(-max(1, len(metrics)) // columns)
    width, height = 2.5 * columns + 0.5, 2.5 * rows + 0.7
    figure = Figure(figsize=(width, height))
    title = f"{_drawable(score.task, 'task')}: {score.report.rows} rows of {_drawable(score.dataset, 'data')}"
    figure.suptitle(title, color=INK, fontsize=11)
    panels = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=_margins(width, height)).flat)
    for panel, (name, value) in zip(panels, metrics.items(), strict=False):
        _panel(panel, name, value, None if base is None else base.report.metrics.get(name))
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    return figure


def _margins(width: float, height: float) -> dict[str, float]:
    """Room for titles and numbers, in inches: matplotlib's own layouts draw everything twice to find it."""
    return {
        "left": 0.6 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.35 / height,
        "top": 1 - 0.75 / height,
        "wspace": 0.4,
        "hspace": 0.35,
    }


def _panel(panel: Axes, name: str, value: float, base: float | None) -> None:
    bars = (
        [("adapter", value, ACCENT)] if base is None else [("base", base, PALE), ("adapter", value, ACCENT)]
    )
    labels, heights, colours = zip(*bars, strict=True)
    drawable = [height if math.isfinite(height) else 0.0 for height in heights]
    drawn = panel.bar(labels, drawable, color=colours, width=0.6)
    panel.bar_label(drawn, [f"{height:.3g}" for height in heights], padding=2, color=INK, fontsize=9)
    panel.set_title(name, color=INK, fontsize=10, y=1.02)  # given a place, it looks for none
    panel.set_xlim(-0.8, len(bars) - 0.2)
    if all(0 <= height <= BOUNDED for height in drawable):
        panel.set_ylim(0, 1.15)
    else:
        panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=INK, labelsize=8)


def confusion_matrix(score: Scores) -> Figure:
    """Rows are the truth; colour is the share of its row, numbers are counts and that share."""
    import numpy as np
    from matplotlib.figure import Figure

    labels = [_drawable(label, f"label {number}") for number, label in enumerate(score.report.labels, 1)]
    counts = np.array(score.report.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(3.6, 0.95 * len(labels) + 1.8)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(
        xlabel="predicted", ylabel="true", title=f"{_drawable(score.task, 'task')}: {score.report.rows} rows"
    )
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else INK
        text = f"{counts[row, column]}\n{share:.0%}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.spines[:].set_visible(False)
    return figure


def _drawable(text: str, instead: str) -> str:
    """`text`, or `instead` where matplotlib's own font lacks a character of it (Chinese labels)."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return text if all(font.get_char_index(ord(character)) for character in text) else instead
