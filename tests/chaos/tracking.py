"""The MLflow server away in the middle of a training, stopped so that it answers nothing, or killed.

A host on Ray trains on; what the registry misses is kept in the store. Once the server is back, the curve in
MLflow must have every step once and the adapter must be one whole version. A stopped server is the worse
case: a call to it is not refused but waits for its timeout; the controller must not wait with it.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from orchestrator.job import Status
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.raylets import Watched, World, job, make_files, raylets
from workers.types import Attached, StepDone

PATIENCE = 1200.0
LONGEST_ROUND = 1.0
"""Seconds."""


def case(folder: Path, small: bool, seed: int, times: int = 600) -> Outcome:
    """`times`: seconds that the server stays away."""
    away = 15.0 if small else float(times)
    began = time.monotonic()
    home = folder / "mlflow"
    with raylets(folder / "ray", nodes=1) as nodes, tracking_server.start(home) as server:
        registry = MlflowRegistry(server.url)
        cluster = Watched(folder, nodes.address)
        with closing(cluster):
            # Longer than the absence: 60 to 70 steps a second were seen.
            steps = int(90 * (away + 30))
            world = World(make_files(folder, {"one": 1}), cluster, registry, [job("finance", "one", steps)])
            world.tick_until(lambda: newest(cluster) >= 20, PATIENCE)
            steps_before, rounds = newest(cluster), [0.0]
            stopped = [process for process in serving(home) if stop(process)]
            until = time.monotonic() + away
            while time.monotonic() < until:
                at = time.monotonic()
                world.controller.tick()
                rounds.append(time.monotonic() - at)
                time.sleep(0.1)
            trained = newest(cluster) - steps_before
            left = steps - newest(cluster)
            for process in stopped:
                process.send_signal(signal.SIGCONT)
            world.tick_until(lambda: not world.store.unfinished_jobs(), PATIENCE)
            (row,) = world.store.jobs()
            began_training = sum(isinstance(event, Attached) for _, _, event in cluster.heard)
            world.controller.close()
        (version,) = registry.versions() or (None,)
        curve = Counter(step_numbers(registry, version.run_id)) if version else Counter[int]()
    missing, doubled = len(set(range(1, steps + 1)) - set(curve)), sum(curve.values()) - len(curve)
    return Outcome(
        "chaos-tracking",
        f"The MLflow server stopped for {away:.0f} s in the middle of a training",
        [
            Table(
                "What went on",
                ("what", "value"),
                [
                    ("processes stopped", len(stopped)),
                    ("steps reported meanwhile", trained),
                    ("steps of the job", steps),
                    ("steps left when it came back", left),
                    ("attempts", row.attempt),
                ],
            )
        ],
        [
            Target("steps reported while it was away", trained, 1),
            Target(
                "longest round of the controller meanwhile, s", max(rounds), LONGEST_ROUND, at_least=False
            ),
            Target("the job succeeded (1: yes)", float(row.status is Status.SUCCEEDED), 1),
            Target("times a host began to train it", began_training, 1, at_least=False),
            Target("steps missing from the curve in MLflow", missing, 0, at_least=False),
            Target("steps in it twice", doubled, 0, at_least=False),
            Target("versions registered", float(version is not None), 1),
        ],
        Bars({"steps before": float(steps_before), "steps meanwhile": float(trained)}, "steps"),
        [f"It took {time.monotonic() - began:.0f} s; seed {seed}."],
    )


def newest(cluster: Watched) -> int:
    return max((event.step for _, _, event in cluster.heard if isinstance(event, StepDone)), default=0)


def serving(home: Path) -> list[psutil.Process]:
    """The server's processes of this home, all started by us; not the one that watches them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "mlflow" in words and "registry.watch" not in words:
                found.append(process)
    return found


def stop(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        process.send_signal(signal.SIGSTOP)
        return True
    return False


def step_numbers(registry: Any, run_id: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    return [metric.step for metric in MlflowClient(registry.url).get_metric_history(run_id, "loss")]
