"""What co-residence is worth on a trace of LoRA jobs: makespan and completion with one and with eight slots.

The trace is drawn here, from a seed; the hosts tick as `residents` and `tokens` measured: their newest
records are read, and a tick of N tokens is taken to last `fixed + each * N`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from orchestrator.policy import Policy
from orchestrator.simulate.policies import PolicyName
from orchestrator.simulate.simulation import Outcome as Simulated
from orchestrator.simulate.simulation import simulate
from orchestrator.simulate.traces import TraceJob, in_time
from orchestrator.simulate.world import Setting as Cluster
from tests.bench.measure import Setting
from tests.bench.record import Bars, Outcome, Table

RESULTS = Path(__file__).parent / "results"
RANKS_A_HOST = 2
"""As the records have it."""
GPUS = 16
JOBS = 600
SLOTS = 8
TOKENS = {"short": (32, 64, 128), "mixed": (32, 64, 128, 256, 512, 1024, 2048), "long": (512, 1024, 2048)}
"""Of a job, a rank and a tick; each as likely as the others."""
LOADS = (0.5, 1.0, 2.0)
"""Work that arrives over work that hosts of one slot could do."""
BASES = {"base-a": 0.6, "base-b": 0.3, "base-c": 0.1}
TEAMS = {"a": 0.5, "b": 0.25, "c": 0.15, "d": 0.1}
STEPS = (500, 50_000)
"""Log-uniform."""
SEED = 20261126
MEASURES: dict[str, Callable[[Simulated], float]] = {
    "makespan": lambda ran: ran.summary.makespan,
    "mean completion": lambda ran: ran.summary.mean_completion,
    "p99 completion": lambda ran: ran.summary.p99_completion,
    "GPU time": lambda ran: sum(job.attained for job in ran.jobs.values()),
}
ROW = re.compile(r"\| (\d+) jobs x (\d+) tokens, 2 ranks \| ([\d,]+) \| ([\d,]+) \|")


@dataclass(frozen=True)
class Tick:
    """Seconds of a tick of N tokens on all ranks: fixed + each * N."""

    fixed: float
    each: float

    def seconds(self, tokens: float) -> float:
        return self.fixed + self.each * tokens


def packing(setting: Setting) -> Outcome:
    points = _measured()
    tick = fitted(points)
    loads, jobs = (LOADS[-1:], 60) if setting.small else (LOADS, JOBS)
    rows, gains = [], {}
    for kind in TOKENS:
        for load in loads:
            drawn = trace(kind, load, tick, jobs)
            alone, together = (_simulated(drawn, tick, slots) for slots in (1, SLOTS))
            rows.append((f"{kind}, load {load:g}", *_cells(alone, together)))
            gain = alone.summary.mean_completion / together.summary.mean_completion
            gains[f"{kind}, load {load:g}"] = gain
    return Outcome(
        "packing",
        f"{jobs} LoRA jobs on {GPUS} GPUs: {SLOTS} residents a host against one",
        [_table(rows), _fit(points, tick)],
        [],
        Bars(gains, "mean completion of one resident a host over that of eight"),
        [NOTE],
    )


NOTE = f"""\
**How the trace was drawn** (seed {SEED}): arrivals are Poisson, so that the work that arrives is *load*
times what the hosts could do with one slot each. Steps are log-uniform from {STEPS[0]:,} to
{STEPS[1]:,}; tokens a rank and tick uniform over {TOKENS["mixed"]} (mixed), {TOKENS["short"]} (short),
{TOKENS["long"]} (long); bases {BASES}, teams {TEAMS} by these chances. A job trains on {RANKS_A_HOST}
ranks. Decided every 10 s; a host takes 60 s to load, which is assumed, not measured. Policy `chorus`,
equal weights, steps to come known once a job has run.

**What this does not say**: the ticks were measured on a small base on CPUs. What residents share is
larger where a tick is bound by the gathering of weights, smaller where one resident fills the device."""


def trace(kind: str, load: float, tick: Tick, jobs: int) -> tuple[TraceJob, ...]:
    """Seconds are those of a host of its own."""
    draw = random.Random(f"{SEED} {kind}")
    lowest, highest = STEPS
    found: list[TraceJob] = []
    for number in range(jobs):
        alone = tick.seconds(draw.choice(TOKENS[kind]) * RANKS_A_HOST)
        steps = lowest * (highest / lowest) ** draw.random()
        (base,), (team,) = _one_of(draw, BASES), _one_of(draw, TEAMS)
        found.append(TraceJob(f"job-{number:04}", 0.0, steps * alone, RANKS_A_HOST, team, 50, base, 1, alone))
    work = sum(job.seconds for job in found)
    apart = work / (GPUS // RANKS_A_HOST) / load / jobs
    at = 0.0
    for number, job in enumerate(found):
        found[number] = replace(job, submitted_at=at)
        at += draw.expovariate(1 / apart)
    return in_time(found)


def _one_of(draw: random.Random, chances: dict[str, float]) -> list[str]:
    return draw.choices(list(chances), list(chances.values()))


def _simulated(jobs: Sequence[TraceJob], tick: Tick, slots: int) -> Simulated:
    cluster = Cluster(GPUS, every=10.0, load=60.0, shared=tick.fixed, steps_known=True)
    return simulate([replace(job, slots=slots) for job in jobs], cluster, PolicyName.chorus, Policy())


def _cells(alone: Simulated, together: Simulated) -> list[str]:
    cells: list[str] = []
    for measure in MEASURES.values():
        one, many = measure(alone) / 3600, measure(together) / 3600
        cells += [f"{one:.2f}", f"{many:.2f}", f"{one / many:.2f}"]
    return cells


def _table(rows: Sequence[Sequence[object]]) -> Table:
    header = ["trace"]
    for what in MEASURES:
        header += [f"{what}, 1 slot, h", f"{SLOTS} slots, h", "times"]
    return Table("With and without co-residence", header, rows)


# ---- ticks as measured ----------------------------------------------------------------------------------


def _measured() -> list[tuple[str, float, float]]:
    """(load, tokens of a tick on all ranks, seconds) of the newest records."""
    found: dict[tuple[int, int], tuple[str, float, float]] = {}
    for path in _newest(("residents", "tokens")):
        for jobs, tokens, together, alone in ROW.findall(path.read_text()):
            for count, rate in ((int(jobs), together), (1, alone)):
                total = count * int(tokens) * RANKS_A_HOST
                where = f"{count} x {tokens} ({path.stem})"
                found.setdefault((count, int(tokens)), (where, total, total / float(rate.replace(",", ""))))
    return list(found.values())


def _newest(cases: Iterable[str]) -> list[Path]:
    return [max(RESULTS.glob(f"????-??-??-{case}.md")) for case in cases]


def fitted(points: Sequence[tuple[str, float, float]]) -> Tick:
    """Least squares of the relative error."""
    seconds = numpy.array([point[2] for point in points])
    design = numpy.array([[1.0, point[1]] for point in points]) / seconds[:, None]
    (fixed, each), *_ = numpy.linalg.lstsq(design, numpy.ones(len(points)), rcond=None)
    return Tick(float(fixed), float(each))


def _fit(points: Sequence[tuple[str, float, float]], tick: Tick) -> Table:
    rows = [
        (where, f"{seconds * 1e3:.0f}", f"{tick.seconds(tokens) * 1e3:.0f}")
        for where, tokens, seconds in points
    ]
    title = f"Ticks as measured, and as {tick.fixed * 1e3:.1f} ms + {tick.each * 1e6:.0f} us a token"
    return Table(title, ("residents x tokens (record)", "measured, ms", "taken, ms"), rows)
