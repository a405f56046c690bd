"""Runs a trace through a policy in simulated time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.policy import Policy
from orchestrator.simulate.measures import History, Summary, summary
from orchestrator.simulate.policies import PolicyName, Rule, rule
from orchestrator.simulate.traces import TraceJob
from orchestrator.simulate.world import Setting, SimJob, World


@dataclass(frozen=True)
class Outcome:
    policy: PolicyName
    summary: Summary
    history: History
    jobs: dict[str, SimJob]
    too_large: int
    """Jobs left out, as the cluster has fewer ranks than each needs."""


def simulate(
    jobs: Sequence[TraceJob],
    setting: Setting,
    name: PolicyName,
    policy: Policy,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Until every job that can ever fit has ended. `clock` times the decisions."""
    chosen, history = rule(name, policy), History()
    fitting = [job for job in jobs if job.ranks <= setting.ranks]
    world = World(fitting, setting, chosen.policy, chosen.fair)
    world.advance(0.0)
    while not world.finished:
        _decide(world, chosen, history, clock)
        then = _next_round(world)
        history.weigh(world, then - world.now)
        world.advance(then)
    history.note(world)
    found = summary(world.jobs.values(), history, setting.ranks)
    return Outcome(name, found, history, world.jobs, len(jobs) - len(fitting))


def _decide(world: World, chosen: Rule, history: History, clock: Callable[[], float]) -> None:
    """Until nobody makes way: who does has left at once, and for whom it did starts in the same round."""
    while True:
        snapshot = world.snapshot()
        start = clock()
        decision = chosen.decide(snapshot)
        history.decided.append(clock() - start)
        world.act(decision)
        if not decision.preempt:
            break
    history.note(world)


def _next_round(world: World) -> float:
    """The next multiple of `every` at which there is something to decide."""
    every = world.setting.every
    if world.waiting:
        return world.now + every
    if world.next_arrival is not None:
        return max(-(-world.next_arrival // every) * every, world.now + every)
    return max(host.all_done(world.now) for host in world.hosts.values()) + every
