"""Controllers killed over a host in training, again and again: each time the next one has it, on a real Ray.

A controller is a process; it gets SIGKILL some seconds after it has heard of new steps, and the next one
starts at once, until both jobs have succeeded. Measured: how long until the next one has heard of a new step,
and how many steps the host had done by then. What must hold: the ranks keep their processes, no step is done
twice or missing in a curve, jobs keep their attempt, and the adapters are those of an undisturbed run.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run
from orchestrator.job import Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from orchestrator.store.store import Store
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.ranks import finish
from tests.chaos.raylets import Watched, World, job, make_files, ranks, raylets
from tests.orchestrator.recipe_files import pipeline, write_yaml
from workers.types import Superseded

SUPERSEDED = 7
"""Exit code of a controller that another has taken over from."""
LONGEST_LIFE = 4.0
"""Seconds a controller has after it has heard of new steps."""
PATIENCE = 300.0


def work(folder: Path, ray_home: Path, address: str, registry: Any) -> None:
    """Be a controller on that Ray, until killed or taken over from."""
    with closing(Store.open(folder / "home" / "chorus.db")) as store:
        cluster = RayCluster(ray_home, address=address)
        controller = Controller(store, cluster, registry, folder / "home")
        try:
            controller.run(forever=True, wait=lambda _: time.sleep(0.02))
        except Superseded:
            os._exit(SUPERSEDED)


def main(folder: str, address: str, url: str) -> None:
    work(Path(folder), Path(folder) / "home", address, MlflowRegistry(url))


@dataclass(frozen=True)
class Kill:
    heard_after: float
    """Seconds from the start of the next controller to the first new step that it heard of."""
    meanwhile: int
    """Steps that the jobs did without a controller, or unheard by the last one."""
    same_processes: bool


@dataclass
class Struck:
    """A home whose controllers die."""

    folder: Path
    command: list[str]
    store: Store

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "out.txt").open("ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out)

    @property
    def steps(self) -> int:
        """Of all jobs."""
        return sum(job.step for job in self.store.jobs())

    @property
    def trained(self) -> bool:
        """Whether no step is to come."""
        return all(job.num_steps is not None and job.step == job.num_steps for job in self.store.jobs())

    def wait(self, process: subprocess.Popen[bytes], done: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            said = (self.folder / "out.txt").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.01)

    def run(self, chance: random.Random) -> list[Kill]:
        """Kill one controller after the other while the jobs train, and let the last one finish."""
        process, kills = self.start(), list[Kill]()
        try:
            self.wait(process, lambda: self.steps > 0)
            processes = {rank.pid for rank in ranks()}
            while not self.trained:
                time.sleep(chance.uniform(0, LONGEST_LIFE))
                process.kill()
                process.wait()
                known, over, began = self.steps, self.trained, time.monotonic()
                process = self.start()
                self.wait(process, lambda known=known: self.steps > known or self.trained)
                same = {rank.pid for rank in ranks()} == processes
                if over:
                    break
                kills.append(Kill(time.monotonic() - began, self.steps - known, same))
                print(f"{len(kills)}: {kills[-1]}", flush=True)
            self.wait(process, lambda: all(job.status.finished for job in self.store.jobs()))
        finally:
            process.kill()
            process.wait()
        return kills

    def broken_curves(self) -> int:
        """Points that are missing, there twice, or of a second attempt."""
        jobs = self.store.jobs()
        found = [(job, [(row.step, row.attempt) for row in self.store.metrics(job.id)]) for job in jobs]
        return sum(
            len({*points} ^ {(step, 1) for step in range(1, (job.num_steps or 0) + 1)})
            for job, points in found
        )


def case(folder: Path, small: bool, seed: int) -> Outcome:
    chance, began = random.Random(seed), time.monotonic()
    steps = 300 if small else 3000
    jobs = [job("finance", "pair", steps), job("support", "pair", steps, lora_r=8, seed=5)]
    with raylets(folder / "ray", nodes=2) as nodes, tracking_server.start(folder / "mlflow") as server:
        calm = folder / "calm"
        cluster = Watched(calm, nodes.address)
        undisturbed = World(make_files(calm, {"pair": 2}), cluster, MlflowRegistry(server.url), jobs)
        finish(undisturbed)
        cluster.close()
        struck = make_struck(folder / "struck", jobs, nodes.address, server.url)
        kills = struck.run(chance)
        take_away(struck, nodes.address)
    plans = {job.name: job.series for job in struck.store.jobs()}
    file = "adapter/adapter_model.safetensors"
    trained = {
        name: (struck.folder / "home/checkpoints" / series / file).read_bytes()
        for name, series in plans.items()
    }
    same = trained == undisturbed.adapters()
    return outcome(kills, 1 if small else 10, struck, same, time.monotonic() - began, seed)


def make_struck(folder: Path, jobs: list[dict[str, Any]], address: str, url: str) -> Struck:
    recipe = write_yaml(make_files(folder, {"pair": 2}) / "demo.yaml", pipeline(*jobs))
    store = Store.open(folder / "home" / "chorus.db")
    store.submit(new_run(make_plan(load_pipeline(recipe))))
    script = "import sys; from tests.chaos.controllers import main; main(*sys.argv[1:])"
    return Struck(folder, [sys.executable, "-c", script, str(folder), address, url], store)


def take_away(struck: Struck, address: str) -> None:
    """The last controller was killed too."""
    cluster = RayCluster(struck.folder / "home", address=address)
    cluster.adopt(struck.store.epochs.begin("the end"))
    cluster.close()


def outcome(kills: list[Kill], wanted: int, struck: Struck, same: bool, seconds: float, seed: int) -> Outcome:
    jobs = struck.store.jobs()
    heard, meanwhile = [kill.heard_after for kill in kills], [kill.meanwhile for kill in kills]
    return Outcome(
        "chaos-controllers",
        f"{len(kills)} controllers killed over a host in training",
        [
            Table(
                "Median and most",
                ("kills", "next one heard a new step after (s)", "steps it had not heard of by then"),
                [
                    (
                        len(kills),
                        f"{median(heard):.1f}, {max(heard):.1f}",
                        f"{median(meanwhile):.0f}, {max(meanwhile)}",
                    )
                ],
            )
        ],
        [
            Target("kills", len(kills), wanted),
            Target(
                "kills after which a rank was another process",
                sum(not kill.same_processes for kill in kills), 0, at_least=False,
            ),
            Target("most seconds until control is back", max(heard), 30, at_least=False),
            Target(
                "steps missing, doubled or of a second attempt", struck.broken_curves(), 0, at_least=False
            ),
            Target("jobs that succeeded", sum(job.status is Status.SUCCEEDED for job in jobs), len(jobs)),
            Target(
                "adapters are the undisturbed run's, byte for byte (1: yes)", float(same), 1
            ),
        ],
        Bars({str(n + 1): kill.heard_after for n, kill in enumerate(kills)}, "seconds to a new step heard"),
        [
            "Most of the time until control is back is the command's start: Python's imports, joining Ray. "
            f"It took {seconds:.0f} s; seed {seed}."
        ],
    )  # fmt: skip
