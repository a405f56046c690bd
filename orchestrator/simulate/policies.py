"""What `--policy` names: the scheduler, the same without its fairness, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

from orchestrator.fairness import Shares
from orchestrator.job import Reason
from orchestrator.placement import Room
from orchestrator.policy import Policy
from orchestrator.scheduler import Decision, Snapshot, schedule

Decide: TypeAlias = Callable[[Snapshot], Decision]


class PolicyName(StrEnum):
    chorus = "chorus"
    las = "las"
    fifo_skip = "fifo-skip"
    fifo = "fifo"


@dataclass(frozen=True)
class Rule:
    decide: Decide
    policy: Policy
    fair: bool
    """Whether it is shown whose a job is; else all are of one team."""


def rule(name: PolicyName, policy: Policy) -> Rule:
    """`las` is the scheduler with one team; `fifo-skip` has one queue too: who does not fit is passed."""
    match name:
        case PolicyName.chorus:
            return Rule(schedule, policy, fair=True)
        case PolicyName.las:
            return Rule(schedule, policy, fair=False)
        case PolicyName.fifo_skip:
            return Rule(schedule, replace(policy, levels=(), most_waiting=float("inf")), fair=False)
        case PolicyName.fifo:
            return Rule(fifo, policy, fair=False)


def fifo(snapshot: Snapshot) -> Decision:
    """By age; who does not fit stops all behind it. Nobody is preempted."""
    no_shares = Shares(snapshot.policy, {})
    room = Room(snapshot.capacity, snapshot.hosts, 0, snapshot.next_host, no_shares, {})
    placements: dict[str, str] = {}
    refusals: dict[str, Reason] = {}
    for job in sorted(snapshot.waiting, key=lambda job: (job.submitted_at, job.job)):
        host = None if refusals else room.warm_host(job)
        if host is not None:
            room.seat(host, job)
            placements[job.job] = host.name
        elif not refusals and job.world_size <= room.spare():
            room.open(job)
            placements[job.job] = room.opened[-1].name
        else:
            refusals[job.job] = Reason.WAITS_FOR_HOST
    return Decision(tuple(room.opened), placements, (), (), refusals, tuple(room.closed))
