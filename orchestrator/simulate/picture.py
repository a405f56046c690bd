"""The picture of a simulation: the queue over time, and what each team held."""

# matplotlib leaves its keyword arguments and paths untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.simulate.simulation import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 1000
"""Of a curve at most: more than there are dots across."""
MOST_TEAMS = 9
HOUR = 3600.0


def write_picture(outcomes: Sequence[Outcome], path: Path) -> None:
    draw(outcomes).savefig(path, dpi=120)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Above, the jobs that wait under each policy; below, the ranks each team holds under the first one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    queue, shares = figure.subplots(2, 1, sharex=True)
    for outcome in outcomes:
        history = outcome.history
        step = max(len(history.at) // POINTS, 1)
        hours = [at / HOUR for at in history.at[::step]]
        queue.step(hours, history.waiting[::step], where="post", label=outcome.policy.value)
    queue.set(ylabel="jobs waiting")
    first = outcomes[0].history
    step = max(len(first.at) // POINTS, 1)
    hours = [at / HOUR for at in first.at[::step]]
    teams = _largest(first.held)
    curves = [[row.get(team, 0.0) for row in first.held[::step]] for team in teams]
    others = [sum(row.values()) - sum(row.get(team, 0.0) for team in teams) for row in first.held[::step]]
    shares.stackplot(hours, *curves, others, labels=[*teams, "others"], step="post", linewidth=0)
    shares.set(xlabel="hours", ylabel=f"ranks held ({outcomes[0].policy.value})")
    for axes in (queue, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _largest(held: Sequence[dict[str, float]]) -> list[str]:
    """The teams that held most."""
    total: dict[str, float] = {}
    for row in held:
        for team, ranks in row.items():
            total[team] = total.get(team, 0.0) + ranks
    return sorted(total, key=lambda team: (-total[team], team))[:MOST_TEAMS]
