"""What the controller costs, and how soon a job steps: a real Ray, a real host, a real MLflow server.

The hosts' processes are not counted: the controller's is this one, Ray's threads in it included. The base is
tiny, so a host steps far more often than one of billions of parameters would, and has more to report.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.control.controller import Controller
from orchestrator.control.curve_export import EXPORT_EVERY, JOBS_A_SECOND
from orchestrator.control.submission import new_run
from orchestrator.job import Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from orchestrator.store.store import Store
from tests.bench.measure import Setting
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.raylets import job
from tests.models import make_base, write_rows
from tests.orchestrator.recipe_files import LABELS, pipeline, write_yaml

PATIENCE = 300.0


class Home:
    """One home with a controller at work, ticked as `chorus serve` does."""

    def __init__(self, folder: Path, cluster: RayCluster, registry: Any) -> None:
        self.folder = folder
        self.store = Store.open(folder / "chorus.db")
        self.controller = Controller(self.store, cluster, registry, folder / "home")
        self.controller.recover()

    def submit(self, name: str, *jobs: dict[str, Any]) -> str:
        file = write_yaml(self.folder / f"{name}.yaml", pipeline(*jobs, name=name))
        return self.store.submit(new_run(make_plan(load_pipeline(file))))

    def until(self, done: Any) -> None:
        began = time.monotonic()
        while not done():
            assert time.monotonic() - began < PATIENCE, [
                (job.name, str(job.status), job.message) for job in self.store.unfinished_jobs()
            ]
            self.round()

    def round(self) -> None:
        self.controller.tick()
        self.controller.rest()

    def working(self) -> list[Any]:
        return [job for job in self.store.unfinished_jobs() if job.status is Status.RUNNING and job.step > 0]


def controller(setting: Setting) -> Outcome:
    residents, seconds, firsts = (4, 3.0, 3) if setting.small else (100, 60.0, 15)
    folder = make_files(setting.folder, residents)
    with (
        tracking_server.start(folder / "mlflow") as server,
        closing(RayCluster(folder, num_cpus=2)) as cluster,
    ):
        home = Home(folder, cluster, MlflowRegistry(server.url))
        first_steps = [first_step(home, number) for number in range(firsts + 1)][1:]
        home.submit("crowd", *(job(f"r{n:03d}", "tiny", 100_000, seed=n) for n in range(residents)))
        home.until(lambda: len(home.working()) == residents)
        joining, *_ = busy(home, residents / JOBS_A_SECOND + 2 * EXPORT_EVERY)
        cpu, ticks, steps = busy(home, seconds)
        home.controller.close()
    return Outcome(
        "controller",
        f"The controller at {residents} residents",
        [
            Table(
                f"{residents} residents on one host, over {seconds:g} s",
                ("what", "value"),
                [
                    ("CPU seconds of the controller's process a second", f"{cpu:.4f}"),
                    ("the same before, while their runs were made in MLflow", f"{joining:.4f}"),
                    ("rounds a second", f"{ticks:.1f}"),
                    ("steps reported a second, all residents", f"{steps:.1f}"),
                ],
            ),
            Table(
                f"Seconds from submission to the first step reported, {firsts} jobs on a warm host",
                ("p50", "p90", "most"),
                [
                    (
                        f"{median(first_steps):.2f}",
                        f"{quantiles(first_steps, n=10)[-1]:.2f}",
                        f"{max(first_steps):.2f}",
                    )
                ],
            ),
        ],
        [
            Target("CPU of the controller, in percent of a core", 100 * cpu, 1.0, at_least=False),
            Target("seconds to the first step on a warm host, p50", median(first_steps), 1.0, at_least=False),
        ],
        Bars({"controller's CPU (% of a core)": 100 * cpu}, "percent"),
        ["Submission is counted from the return of `Store.submit`, when it is on disk."],
    )


def first_step(home: Home, number: int) -> float:
    """The first one opens the host; the others find it warm and idle."""
    run = home.submit(f"first-{number}", job(f"f{number}", "tiny", 3, seed=1000 + number))
    began = time.monotonic()
    home.until(lambda: any(job.step > 0 for job in home.store.jobs(run)))
    took = time.monotonic() - began
    home.until(lambda: not home.store.unfinished_jobs(run))
    return took


def busy(home: Home, seconds: float) -> tuple[float, float, float]:
    """CPU seconds a second, rounds a second, and steps reported a second."""
    process = psutil.Process()
    before, steps, began, rounds = process.cpu_times(), progress(home), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        home.round()
        rounds += 1
    after, wall = process.cpu_times(), time.monotonic() - began
    cpu = after.user + after.system - before.user - before.system
    return cpu / wall, rounds / wall, (progress(home) - steps) / wall


def progress(home: Home) -> int:
    return sum(job.step for job in home.store.unfinished_jobs())


def make_files(folder: Path, slots: int) -> Path:
    make_base(folder / "bases" / "model")
    base = {"model": "model", "world_size": 1, "slots": slots + 1, "tokens_per_tick": 4096}
    write_yaml(folder / "bases" / "tiny.yaml", base)
    for split in ("train", "validation", "test"):
        count = 80 if split == "train" else 8
        rows = [{"text": f"{split} headline {n}", "label": LABELS[n % 3]} for n in range(count)]
        write_rows(folder / f"data/{split}.jsonl", rows)
    return folder
