"""A Ray cluster of several nodes on this machine, a raylet each, and a controller of ours that works on it.

The head holds no CPU, so that every rank lives on a node that can be killed. All processes are children of
this one, which is how the ranks are told from those of any other Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.store import Store
from tests.models import make_base, write_rows
from tests.orchestrator.recipe_files import LABELS, pipeline, write_yaml
from workers.types import Event

CHECKPOINT_EVERY = 10
"""Steps."""
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""A node that says nothing is given up after 3 s instead of Ray's 30."""


CURRENT = Path("/tmp/ray/ray_current_cluster")
"""Where Ray leaves a cluster's address for any later `ray.init` on this machine, which is not wanted."""


@contextmanager
def raylets(folder: Path, nodes: int, cpus: int = 1, **head: Any) -> Generator[Any]:
    """`ray.cluster_utils.Cluster` with that many nodes beside the head."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    quiet = {"include_dashboard": False, "object_store_memory": 80 * 2**20, "include_log_monitor": False}
    first = {**quiet, "num_cpus": 0, "temp_dir": str(folder), "_system_config": HEALTH, **head}
    CURRENT.parent.mkdir(exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args=first)
    CURRENT.unlink(missing_ok=True)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, **quiet)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def ranks() -> list[psutil.Process]:
    """The rank processes of this process's Ray, whatever method they are in."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith("ray::Rank"):
                found.append(process)
    return found


class Watched(RayCluster):
    """Keeps what the hosts report, and when."""

    def __init__(self, home: Path, address: str) -> None:
        super().__init__(home, address=address)
        self.heard: list[tuple[float, str, Event]] = []

    def poll(self, host: str) -> list[Event]:
        events = list(super().poll(host))
        self.heard += [(time.monotonic(), host, event) for event in events]
        return events

    def hosts(self) -> list[str]:
        return list(self._gangs)

    def nodes_of(self, host: str) -> set[str]:
        """Ids of the nodes that hold a bundle of the host."""
        from ray.util import placement_group_table

        return set(placement_group_table(self._gangs[host].group)["bundles_to_node_id"].values())


class World:
    """A home with jobs on a small random base, and its controller, ticked by whoever watches."""

    def __init__(self, folder: Path, cluster: Watched, registry: Any, jobs: list[dict[str, Any]]) -> None:
        self.folder, self.cluster = folder, cluster
        recipe = write_yaml(folder / "demo.yaml", pipeline(*jobs))
        self.store = Store.open(folder / "home" / "chorus.db")
        self.run = self.store.submit(new_run(make_plan(load_pipeline(recipe))))
        self.controller = Controller(self.store, cluster, registry, folder / "home")
        self.controller.recover()

    def tick_until(self, done: Any, seconds: float) -> float:
        """Tick until `done()`; seconds it took. Fails with what the jobs say."""
        began = time.monotonic()
        while not done():
            self.controller.tick()
            words = [(job.name, str(job.status), job.step, job.message) for job in self.store.jobs()]
            assert time.monotonic() - began < seconds, words
            time.sleep(0.02)
        return time.monotonic() - began

    def adapters(self) -> dict[str, bytes]:
        """Job -> the weights it ended with."""
        plans = {job.name: job.series for job in self.store.jobs()}
        folder = self.folder / "home" / "checkpoints"
        file = "adapter/adapter_model.safetensors"
        return {name: (folder / series / file).read_bytes() for name, series in plans.items()}


def make_files(folder: Path, bases: dict[str, int]) -> Path:
    """Base files by name with their ranks, and data whose epoch is 20 steps of 4 rows."""
    make_base(folder / "bases" / "model")
    for number, (name, size) in enumerate(bases.items()):
        base = {"model": "model", "world_size": size, "tokens_per_tick": 512 + number}
        write_yaml(folder / "bases" / f"{name}.yaml", base)
    for split in ("train", "validation", "test"):
        count = 80 if split == "train" else 8
        rows = [{"text": f"{split} headline {n}", "label": LABELS[n % 3]} for n in range(count)]
        write_rows(folder / f"data/{split}.jsonl", rows)
    return folder


def job(name: str, base: str, steps: int, **changes: Any) -> dict[str, Any]:
    datasets = [{"path": "data", "type": "classification", "labels": LABELS}]
    epoch = 20
    return {
        "version": 1, "name": name, "task": name, "base_model": f"bases/{base}.yaml", "datasets": datasets,
        "sequence_len": 64, "global_batch_size": 4, "max_steps": steps, "lora_r": 4, "learning_rate": 1e-3,
        "saves_per_epoch": epoch // CHECKPOINT_EVERY, "evals_per_epoch": 0, **changes,
    }  # fmt: skip
