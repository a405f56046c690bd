"""Ranks killed and stopped, over and over, under two jobs on a host of two ranks on a Ray of several raylets.

By turns SIGKILL and SIGSTOP, each at a random step, only after the jobs got further than at the last one:
else they would be taken for what their hosts die of, and quarantined, as is right. What is measured: how long
until the host is known to be lost, how long until the jobs step again, and how many steps they do again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter

from orchestrator.job import Status
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.raylets import CHECKPOINT_EVERY, Watched, World, job, make_files, ranks, raylets
from workers.hang import VARIABLE
from workers.types import Attached, HostFailed, StepDone

HANG_SECONDS = 6.0
LEAST, MOST = 3, 20
"""Steps between one that was never done before and the next fault."""
PATIENCE = 180.0
JOBS = ("finance", "support")


@dataclass(frozen=True)
class Fault:
    signal: str
    found: float
    """Seconds from the signal to the controller's knowing."""
    resumed: float
    """Seconds from the signal to the first step of every job on a new host."""
    redone: int
    """Most steps any job did again."""


def strike(world: World, number: signal.Signals, chance: random.Random) -> Fault:
    """Send the signal to a rank once every job has got further than ever, and see the jobs go on."""
    cluster = world.cluster
    target = {name: step + chance.randint(LEAST, MOST) for name, step in furthest(cluster).items()}
    world.tick_until(lambda: all(furthest(cluster)[name] >= target[name] for name in JOBS), PATIENCE)
    before = len(cluster.heard)
    chance.choice(sorted(ranks(), key=lambda process: process.pid)).send_signal(number)
    struck = time.monotonic()
    world.tick_until(lambda: resumed(cluster, before) is not None, PATIENCE)
    events = cluster.heard[before:]
    end = next(place for place, (_, _, event) in enumerate(events) if isinstance(event, HostFailed))
    reached = furthest(cluster, before + end)
    back = resumed(cluster, before)
    assert back is not None
    redone = max(reached[name] - step for name, step in back[1].items())
    return Fault(number.name, events[end][0] - struck, back[0] - struck, redone)


def furthest(cluster: Watched, until: int | None = None) -> dict[str, int]:
    """Job -> the furthest step it has reported, up to that report."""
    steps = dict.fromkeys(JOBS, 0)
    for _, _, event in cluster.heard[:until]:
        if isinstance(event, StepDone):
            name = event.job.rpartition(".")[2]
            steps[name] = max(steps[name], event.step)
    return steps


def resumed(cluster: Watched, since: int) -> tuple[float, dict[str, int]] | None:
    """When every job had stepped on a later host, and at which step each began there; None if not yet."""
    began: dict[str, int] = {}
    stepped: dict[str, float] = {}
    lost = False
    for at, _, event in cluster.heard[since:]:
        lost |= isinstance(event, HostFailed)
        if lost and isinstance(event, Attached):
            began[event.job.rpartition(".")[2]] = event.step
        if lost and isinstance(event, StepDone):
            stepped.setdefault(event.job.rpartition(".")[2], at)
    return (max(stepped.values()), began) if len(stepped) == len(JOBS) else None


@dataclass(frozen=True)
class Part:
    """One run of the case; a record may be made of several."""

    seed: int
    seconds: float
    same: bool
    """Whether the adapters are those of the undisturbed run."""
    faults: tuple[Fault, ...]


def case(folder: Path, small: bool, seed: int, times: int = 100, parts: Path | None = None) -> Outcome:
    """`parts`: a file that keeps what earlier runs found; this one is added, and the record is of all."""
    part = run(folder, small, seed, times)
    if parts is None:
        return outcome([part], small)
    with parts.open("a") as file:
        file.write(json.dumps(asdict(part)) + "\n")
    return outcome([TypeAdapter(Part).validate_json(line) for line in parts.read_text().splitlines()], small)


def run(folder: Path, small: bool, seed: int, times: int) -> Part:
    chance, times, began = random.Random(seed), 2 if small else times, time.monotonic()
    os.environ[VARIABLE] = f"{HANG_SECONDS:g}"
    # The last fault must still find both at work, and they get further than asked between two ticks.
    steps = (MOST + 15) * (times + 2)
    jobs = [job("finance", "pair", steps), job("support", "pair", steps, lora_r=8, seed=5)]
    with raylets(folder / "ray", nodes=3) as nodes, tracking_server.start(folder / "mlflow") as server:
        cluster = Watched(folder, nodes.address)
        registry = MlflowRegistry(server.url)
        faults: list[Fault] = []
        undisturbed = World(make_files(folder / "calm", {"pair": 2}), cluster, registry, jobs)
        finish(undisturbed)
        cluster.heard.clear()
        world = World(make_files(folder / "struck", {"pair": 2}), cluster, registry, jobs)
        for turn in range(times):
            number = (signal.SIGKILL, signal.SIGSTOP)[turn % 2]
            faults.append(strike(world, number, chance))
            print(f"{turn + 1}/{times} after {time.monotonic() - began:.0f} s: {faults[-1]}", flush=True)
        finish(world)
        same = world.adapters() == undisturbed.adapters()
        cluster.close()
    return Part(seed, round(time.monotonic() - began), same, tuple(faults))


def finish(world: World) -> None:
    world.tick_until(lambda: all(job.status.finished for job in world.store.jobs()), 20 * PATIENCE)
    said = [(job.status, job.message) for job in world.store.jobs()]
    assert {status for status, _ in said} == {Status.SUCCEEDED}, said
    world.controller.close()


def outcome(parts: list[Part], small: bool) -> Outcome:
    faults = [fault for part in parts for fault in part.faults]
    killed = [fault for fault in faults if fault.signal == "SIGKILL"]
    stopped = [fault for fault in faults if fault.signal == "SIGSTOP"]
    rows = [
        (
            name,
            len(some),
            f"{median(f.found for f in some):.1f}, {max(f.found for f in some):.1f}",
            f"{median(f.resumed for f in some):.1f}, {max(f.resumed for f in some):.1f}",
            f"{median(f.redone for f in some):.0f}, {max(f.redone for f in some)}",
        )
        for name, some in (("SIGKILL", killed), ("SIGSTOP", stopped))
    ]
    header = ("signal", "times", "found after (s)", "stepping again after (s)", "steps done again")
    return Outcome(
        "chaos-ranks",
        f"{len(faults)} ranks killed or stopped on three raylets",
        [Table("Median and most", header, rows)],
        [
            Target("signals", len(faults), 1 if small else 100),
            Target(
                "most steps done again",
                max(f.redone for f in faults), CHECKPOINT_EVERY + 1, at_least=False,
            ),
            Target("most seconds until a kill is found", max(f.found for f in killed), 5, at_least=False),
            Target(
                f"most seconds until a stop is found (timeout {HANG_SECONDS:g} s)",
                max(f.found for f in stopped), 2 * HANG_SECONDS, at_least=False,
            ),
            Target(
                "most seconds from a kill to stepping again",
                max(f.resumed for f in killed), 30, at_least=False,
            ),
            Target(
                "most seconds from finding a stop to stepping again",
                max(f.resumed - f.found for f in stopped), 30, at_least=False,
            ),
            Target(
                "adapters are the undisturbed run's, byte for byte (1: yes)",
                float(all(part.same for part in parts)), 1,
            ),
        ],
        Bars({f"{f.signal} {n + 1}": f.resumed for n, f in enumerate(faults)}, "seconds to stepping again"),
        [
            f"Two jobs on one host of two ranks, a checkpoint every {CHECKPOINT_EVERY} steps; a new host's "
            "start, which imports torch and DeepSpeed in both ranks, is most of the time to stepping again. "
            f"{len(parts)} runs one after the other, seeds {', '.join(str(part.seed) for part in parts)}, "
            f"{sum(part.seconds for part in parts):.0f} s in all."
        ],
    )  # fmt: skip
