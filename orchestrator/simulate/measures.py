"""What a simulation came to: completion, waiting, slowdown, fairness, and how long the decisions took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.fairness import jain
from orchestrator.policy import Policy
from orchestrator.simulate.world import SimJob, World

SHORT = 600.0
"""Slowdown is bounded: jobs shorter than this count as so long (Feitelson and Rudolph, JSSPP'98)."""
TOLD = 3600.0
"""A team counts for the index of fairness that was backlogged for the whole cluster's work of so long."""


@dataclass(frozen=True)
class Summary:
    """Times in seconds."""

    jobs: int
    mean_completion: float
    median_completion: float
    p99_completion: float
    mean_waiting: float
    longest_waiting: float
    makespan: float
    mean_slowdown: float
    share_error: float
    """Of all that backlogged teams were to have, what part they had too much or too little."""
    worst_share_error: float
    """Of the team that it is largest for."""
    jain: float
    """Jain's index over what each backlogged team had of what it was to have."""
    preemptions: int
    decisions: int
    median_decision: float
    p99_decision: float


@dataclass
class History:
    """One row for each round, taken when all was decided."""

    at: list[float] = field(default_factory=list[float])
    waiting: list[int] = field(default_factory=list[int])
    held: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    decided: list[float] = field(default_factory=list[float])
    """Seconds that each decision took: not one a row."""
    had: dict[str, float] = field(default_factory=dict[str, float])
    """Team -> rank-seconds that it held while it was backlogged."""
    due: dict[str, float] = field(default_factory=dict[str, float])
    """The same, as its claim would have it."""

    def note(self, world: World) -> None:
        self.at.append(world.now)
        self.waiting.append(len(world.waiting))
        self.held.append(world.held())

    def weigh(self, world: World, seconds: float) -> None:
        """Count the last row for so long: what backlogged teams hold, and what they were to hold."""
        if not world.waiting:
            return
        demand, held = world.demand, self.held[-1]
        for team, due in fair_ranks(demand, world.setting.ranks, world.policy).items():
            if due < demand[team]:
                self.had[team] = self.had.get(team, 0.0) + held.get(team, 0.0) * seconds
                self.due[team] = self.due.get(team, 0.0) + due * seconds


def fair_ranks(demand: Mapping[str, float], ranks: float, policy: Policy) -> dict[str, float]:
    """Team -> ranks due: its quota if it wants it, the rest by weight and never more than it wants.

    Max-min fairness (Bertsekas and Gallager, Data Networks, 6.5.2), by filling.
    """
    due = {team: min(wanted, policy.team(team).quota) for team, wanted in demand.items()}
    left = ranks - sum(due.values())
    open_teams = sorted(demand, key=lambda team: (demand[team] - due[team]) / policy.team(team).weight)
    weights = sum(policy.team(team).weight for team in open_teams)
    for team in open_teams:
        weight = policy.team(team).weight
        more = min(demand[team] - due[team], max(left, 0.0) * weight / weights)
        due[team] += more
        left, weights = left - more, weights - weight
    return due


def summary(jobs: Iterable[SimJob], history: History, ranks: int) -> Summary:
    """All jobs have ended."""
    ended = [(job, job.ended_at) for job in jobs if job.ended_at is not None]
    took = sorted(end - job.trace.submitted_at for job, end in ended)
    count = max(len(took), 1)
    slowdowns = (
        max((end - job.trace.submitted_at) / max(job.trace.seconds, SHORT), 1.0) for job, end in ended
    )
    due, had = history.due, history.had
    told = [team for team in due if due[team] >= ranks * TOLD]
    off = {team: abs(had[team] - due[team]) for team in told}
    return Summary(
        jobs=len(took),
        mean_completion=sum(took) / count,
        median_completion=quantile(took, 0.5),
        p99_completion=quantile(took, 0.99),
        mean_waiting=sum(job.waited for job, _ in ended) / count,
        longest_waiting=max((job.longest_wait for job, _ in ended), default=0.0),
        makespan=max((end for _, end in ended), default=0.0),
        mean_slowdown=sum(slowdowns) / count,
        share_error=sum(off.values()) / sum(due[team] for team in told) if told else 0.0,
        worst_share_error=max((off[team] / due[team] for team in told), default=0.0),
        jain=jain(had[team] / due[team] for team in told),
        preemptions=sum(job.preemptions for job, _ in ended),
        decisions=len(history.decided),
        median_decision=quantile(sorted(history.decided), 0.5),
        p99_decision=quantile(sorted(history.decided), 0.99),
    )


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of the values do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    rank = -(-part * len(ordered) // 1)
    return ordered[max(int(rank) - 1, 0)]
