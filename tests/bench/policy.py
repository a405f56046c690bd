"""The scheduler at size: a trace of Microsoft's on 512 GPUs, and one decision at 10,000 GPUs.

The trace is not part of the project (CHORUS_TRACES names its folder); without it `philly` says so and ends.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from orchestrator.policy import HOUR, Policy
from orchestrator.scheduler import schedule
from orchestrator.simulate.measures import quantile
from orchestrator.simulate.policies import PolicyName
from orchestrator.simulate.simulation import simulate
from orchestrator.simulate.traces import TraceJob, read_trace
from orchestrator.simulate.world import Setting as Cluster
from orchestrator.simulate.world import World
from tests.bench.measure import Setting, Skipped
from tests.bench.record import Bars, Outcome, Table, Target

TRACES = Path(os.environ.get("CHORUS_TRACES", "/work/shared/data/traces"))
PHILLY_GPUS = 512


def philly(setting: Setting) -> Outcome:
    path = TRACES / "philly.csv"
    if not path.exists():
        raise Skipped(f"{path} is not here: name the folder of the traces in CHORUS_TRACES")
    jobs = read_trace(path)[: 2000 if setting.small else None]
    policy = Policy()
    start = time.perf_counter()
    found = simulate(jobs, Cluster(PHILLY_GPUS), PolicyName.chorus, policy).summary
    wall = time.perf_counter() - start
    hours = {
        "mean completion": found.mean_completion / HOUR,
        "median completion": found.median_completion / HOUR,
        "p99 completion": found.p99_completion / HOUR,
        "mean waiting": found.mean_waiting / HOUR,
        "longest wait in a row": found.longest_waiting / HOUR,
        "makespan": found.makespan / HOUR,
    }
    rest = {
        "slowdown, bounded at 10 min": f"{found.mean_slowdown:.2f}",
        "share error": f"{found.share_error:.2%}",
        "share error of the worst team": f"{found.worst_share_error:.1%}",
        "Jain": f"{found.jain:.4f}",
        "preemptions": f"{found.preemptions:,}",
        "decisions": f"{found.decisions:,}",
        "decision, median": f"{found.median_decision * 1e3:.1f} ms",
        "decision, p99": f"{found.p99_decision * 1e3:.1f} ms",
    }
    rows = [*((name, f"{value:.2f} h") for name, value in hours.items()), *rest.items()]
    targets = [
        Target("mean completion, h", hours["mean completion"], 10.0, at_least=False),
        Target("p99 completion, h", hours["p99 completion"], 150.0, at_least=False),
        Target("share error of backlogged teams", found.share_error, 0.05, at_least=False),
        Target("Jain's index of backlogged teams", found.jain, 0.95),
        Target("minutes of the run", wall / 60, 10.0, at_least=False),
    ]
    shown = {
        "strict FIFO": 226.0,
        "FIFO with skipping": 34.9,
        "two-queue LAS": 9.1,
        "chorus": hours["mean completion"],
    }
    return Outcome(
        "philly",
        f"Philly: {len(jobs):,} jobs on {PHILLY_GPUS} GPUs, durations unknown to the scheduler",
        [Table("The run", ("measure", "found"), rows)],
        targets,
        Bars(shown, "mean completion, h"),
        [PHILLY_NOTE.format(policy=policy)],
    )


PHILLY_NOTE = """\
The real `schedule` over the whole trace, its 15 virtual clusters as teams of equal weight, decided
every 300 s; a job that starts or goes on pays 60 s. Nothing tells it how long a job runs: `levels` go
by what each has had. The figures beside ours in the picture are of simple reference simulators on the
same file (two-queue LAS: p99 292 h).

`{policy}`"""


# ---- 10,000 GPUs ----------------------------------------------------------------------------------------

GPUS = 10_000
WAITING = 10_000
DECISIONS = 200
SETTLING = 10
"""First decisions, not counted."""
SIZES = {1: 0.60, 2: 0.12, 4: 0.10, 8: 0.12, 16: 0.04, 32: 0.015, 64: 0.005}
OWN, SHARED = "own bases", "shared bases"
TEAMS = 20
BASES = 200
SLOTS = 8
HOURS = (0.1, 100.0)
OLDEST = 26 * HOUR
"""How long the first backlog has waited at most: some of it beyond the bound."""
SEED = 20261126


def decision(setting: Setting) -> Outcome:
    gpus, waiting, decisions = (200, 200, 20) if setting.small else (GPUS, WAITING, DECISIONS)
    wanted = {OWN: (OWN, Policy()), SHARED: (SHARED, Policy())}
    unbound = {f"{SHARED}, any number makes way": (SHARED, Policy(most_preempted=waiting))}
    rows, p99, bars = [], {}, {}
    for title, (kind, policy) in {**wanted, **unbound}.items():
        first, each, moves = _decided(kind, policy, gpus, waiting, decisions)
        p99[title] = quantile(each, 0.99) * 1e3
        cells = [f"{quantile(each, part) * 1e3:.1f}" for part in (0.5, 0.9, 0.99, 1.0)]
        rows.append((title, f"{len(each):,}", *cells, f"{first * 1e3:.0f}", f"{moves:.0f}"))
        bars |= {f"{title}, p{part * 100:g}": quantile(each, part) * 1e3 for part in (0.5, 0.9, 0.99, 1.0)}
    header = (
        "jobs",
        "decisions",
        "p50, ms",
        "p90",
        "p99",
        "longest",
        "longest of the first, not counted",
        "moves each",
    )
    return Outcome(
        "decision",
        f"One decision: {gpus:,} GPUs, {waiting:,} jobs waiting",
        [Table("Time of `schedule(Snapshot)`", header, rows)],
        [Target(f"{title}: p99, ms", p99[title], 50.0, at_least=False) for title in wanted],
        Bars(bars, "ms"),
        [DECISION_NOTE],
    )


DECISION_NOTE = f"""\
**How the snapshots were drawn** (seed {SEED}): a full cluster that `simulate`'s world drives by the
decisions themselves, so hosts, residents, decayed use and waits are those of a cluster at work. Jobs
need 1 to 64 GPUs by the chances {SIZES}, run {HOURS[0]:g} to {HOURS[1]:g} h (log-uniform), and are of
{TEAMS} teams of equal weight whose demand falls as 1/rank. *Own bases*: each job is a base of its own,
so each waits for whole hosts. *Shared bases*: {BASES} bases of one size each, {SLOTS} slots a host. Of one
decision {Policy.most_preempted} residents make way (a whole host's at once), or any number (third row).
The first backlog has waited up to {OLDEST / HOUR:g} h (uniform), so some of it beyond the bound of 24 h.
Between two decisions, 60 s apart, jobs end and as many come, so that each decision has as many waiting
as the title says. Not counted are the first {SETTLING} decisions, which fill the empty cluster and let those
beyond the bound take it over, and the making of the snapshots. *Moves*: placements and preemptions of a
decision."""


def _decided(
    kind: str, policy: Policy, gpus: int, waiting: int, decisions: int
) -> tuple[float, list[float], float]:
    """Seconds of the longest of the first decisions; those of the others, sorted; moves of each."""
    cluster = Cluster(gpus, every=60.0, shared=0.5, steps_known=True)
    world, coming = World([], cluster, policy, fair=True), _jobs(kind)
    held, slots, draw = 0, 1 if kind == OWN else SLOTS, random.Random(SEED)
    while held < gpus * slots:
        world.arrive(job := next(coming))
        held += job.ranks
    for job in islice(coming, waiting):
        world.arrive(replace(job, submitted_at=-draw.uniform(0, OLDEST)))
    took: list[float] = []
    moves = 0
    while len(took) < SETTLING + decisions:
        while len(world.waiting) < waiting:
            world.arrive(replace(next(coming), submitted_at=world.now))
        snapshot = world.snapshot()
        start = time.perf_counter()
        decided = schedule(snapshot)
        took.append(time.perf_counter() - start)
        if len(took) > SETTLING:
            moves += len(decided.placements) + len(decided.preempt)
        world.act(decided)
        world.advance(world.now + (0.0 if decided.preempt else cluster.every))
    return max(took[:SETTLING]), sorted(took[SETTLING:]), moves / decisions


def _jobs(kind: str) -> Iterator[TraceJob]:
    draw = random.Random(f"{SEED} {kind}")
    sizes = draw.choices(list(SIZES), list(SIZES.values()), k=BASES)
    return (_job(draw, number, kind, sizes) for number in count())


def _job(draw: random.Random, number: int, kind: str, sizes: Sequence[int]) -> TraceJob:
    (team,) = draw.choices(range(TEAMS), [1 / (rank + 1) for rank in range(TEAMS)])
    base = draw.randrange(BASES)
    ranks = sizes[base] if kind == SHARED else draw.choices(list(SIZES), list(SIZES.values()))[0]
    lowest, highest = HOURS
    seconds = lowest * (highest / lowest) ** draw.random() * HOUR
    shared = ("", 1) if kind == OWN else (f"base-{base}", SLOTS)
    return TraceJob(
        f"job-{number:06}", 0.0, seconds, ranks, f"team-{team}", draw.choice((25, 50, 75)), *shared
    )
