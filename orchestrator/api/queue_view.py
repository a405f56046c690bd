"""The queue as a person wants it: who is where in line, how long what runs will take. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.api.views import DEFAULT_TEAM
from orchestrator.control.show import NAME
from orchestrator.control.submission import read_order
from orchestrator.fairness import past_ranks
from orchestrator.job import Status
from orchestrator.policy import Policy
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store

PACE_STEPS = 20
"""The latest steps, by which the time left is told."""


@dataclass(frozen=True)
class Queue:
    """What the controller last showed."""

    line: tuple[str, ...] = ()
    """Jobs that wait, the first in line first."""
    hosts: tuple[Mapping[str, Any], ...] = ()
    at: float | None = None
    """Seconds since the epoch; None if no controller was ever here."""

    @classmethod
    def read(cls, store: Store) -> Queue:
        board = store.boards.read(NAME)
        if board is None:
            return cls()
        return cls(tuple(job for job, _ in board.value["line"]), tuple(board.value["hosts"]), board.at)

    def position(self, job: JobRow) -> int | None:
        """1 for the first in line; None for one that does not wait, or that no controller has seen yet."""
        if job.status is not Status.WAITING or job.id not in self.line:
            return None
        return self.line.index(job.id) + 1

    def ahead(self, job: JobRow) -> tuple[str, ...]:
        """Who comes before it."""
        position = self.position(job)
        return self.line[: position - 1] if position else ()


def team_of(job: JobRow) -> str:
    return read_order(job.plan).job.team or DEFAULT_TEAM


def seconds_per_step(store: Store, job: JobRow) -> float | None:
    """By the clock, over the latest steps, waits for others' turns included; None before the third step."""
    points = store.metrics(job.id, after=job.step - PACE_STEPS)
    of_attempt = [point for point in points if point.attempt == job.attempt]
    if len(of_attempt) < 3:
        return None
    first, last = of_attempt[0], of_attempt[-1]
    return max(last.at - first.at, 0.0) / (last.step - first.step)


def seconds_left(store: Store, job: JobRow) -> float | None:
    """Of training, for a job that trains; its scoring and registering come on top."""
    if job.status is not Status.RUNNING or not job.num_steps or job.step >= job.num_steps:
        return None
    pace = seconds_per_step(store, job)
    return None if pace is None else pace * (job.num_steps - job.step)


def claim_view(policy: Policy, usage: Mapping[str, float], team: str) -> dict[str, float]:
    """What a team may claim, and its decayed use in ranks: the lower that is, the sooner its turn."""
    claim = policy.team(team)
    lately = past_ranks(usage.get(team, 0.0), policy.half_life)
    return {"weight": claim.weight, "quota": claim.quota, "used_lately": lately}


def teams(jobs: Iterable[JobRow], hosts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a team: how many of its jobs run and wait, how many ranks it holds, and which part."""
    rows: dict[str, dict[str, Any]] = {}
    team: dict[str, str] = {}
    for job in jobs:
        team[job.id] = team_of(job)
        row = rows.setdefault(team[job.id], {"team": team[job.id], "running": 0, "waiting": 0, "ranks": 0.0})
        row["waiting" if job.status is Status.WAITING else "running"] += 1
    for host in hosts:
        aboard = [job for job in host["residents"] if job in team]
        for job in aboard:
            rows[team[job]]["ranks"] += host["world_size"] / len(aboard)
    held = sum(row["ranks"] for row in rows.values())
    return [{**row, "share": row["ranks"] / held if held else 0.0} for _, row in sorted(rows.items())]
