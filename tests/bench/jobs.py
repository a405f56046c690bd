"""Jobs from submission to registered adapters: chorus with a warm host, against a PEFT process for each.

Both register in the same running MLflow server. Chorus also scores every adapter and promotes it; the
processes do not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from mlflow.tracking import MlflowClient

from orchestrator.commands.parts import ClusterChoice
from orchestrator.contracts import Cluster, Registry
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run
from orchestrator.home import Home
from orchestrator.job import Status
from orchestrator.main import open_cluster, open_registry, open_store
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.registry import server as tracking_server
from orchestrator.store.store import Store
from tests.bench.measure import Setting
from tests.bench.peft_process import Order
from tests.bench.record import Bars, Outcome, Table, Target
from tests.bench.rounds import ratio, spread
from tests.bench.workload import PERSISTENT, base_folder, chat_rows
from tests.models import write_rows

CHORUS, PROCESSES = "chorus, warm host", "a PEFT process a job, two at a time"
AT_A_TIME = 2
TOKENS, R, LEARNING_RATE = 32, 8, 1e-3


@dataclass(frozen=True)
class Load:
    """`ranks` rows of 32 tokens make a step, as in the first case of the table."""

    jobs: int
    steps: int
    ranks: int
    local: bool
    """Without Ray, in this process."""


def jobs(setting: Setting) -> Outcome:
    load = Load(1, 3, 1, True) if setting.small else Load(12, 50, 2, False)
    seconds, trained, parts = _measured(setting, load)
    speedup = ratio(seconds, PROCESSES, CHORUS)
    laps = [[part, f"{spread([lap[part] for lap in parts]).median:.2f}"] for part in parts[0]]
    rows = [[name, spread(values)] for name, values in seconds.items()]
    rows.insert(1, ["of which until the last job had trained", spread(trained)])
    how = "without Ray, one rank" if load.local else f"on a Ray of its own, {load.ranks} ranks ZeRO-3"
    return Outcome(
        "jobs",
        f"{load.jobs} jobs of {load.steps} steps, from submission to registered adapters",
        [
            Table(f"{setting.rounds} rounds", ("way", "seconds: median, least and greatest"), rows),
            Table("one PEFT process, medians", ("part", "seconds"), laps),
        ],
        [Target("times less wall time than the processes take", speedup.median, 5)],
        Bars({name: spread(values).median for name, values in seconds.items()}, "seconds"),
        [
            f"Ratio, round by round: {speedup}. A step is {load.ranks} rows of {TOKENS} tokens. "
            f"Chorus, {how}, is timed from reading the pipeline file to the last job's SUCCEEDED: every "
            "adapter is scored, registered and promoted, and the score of the job that warmed the host up is "
            "among what it does. A process trains on one thread and scores nothing. Both register in one "
            "MLflow server that was running before."
        ],
    )


def _measured(
    setting: Setting, load: Load
) -> tuple[dict[str, list[float]], list[float], list[dict[str, float]]]:
    """Seconds by way and round, chorus's until all had trained, and those of each process's parts."""
    seconds: dict[str, list[float]] = {CHORUS: [], PROCESSES: []}
    trained: list[float] = []
    parts: list[dict[str, float]] = []
    home = Home(setting.folder / "home")
    home.folder.mkdir()
    _write_world(setting, load)
    with open_store(home) as store, open_registry(home) as registry:
        uri = _tracking_uri(home)
        with open_cluster(home, ClusterChoice(local=load.local, cpus=2)) as cluster:
            chorus = Chorus(setting, load, store, registry, cluster, home)
            for turn in range(setting.rounds):
                chorus.warm_up(turn)
                until_trained, whole = chorus.run(turn)
                trained.append(until_trained)
                seconds[CHORUS].append(whole)
                orders = [_order(setting, load, uri, turn, index) for index in range(load.jobs)]
                started = time.perf_counter()
                parts += run_processes(orders, setting.folder / "peft")
                seconds[PROCESSES].append(time.perf_counter() - started)
            chorus.controller.close()
    return seconds, trained, parts


def _tracking_uri(home: Home) -> str:
    """The home's running server, with the experiment that the processes share."""
    uri = tracking_server.running_url(home.folder)
    assert uri is not None, "the registry of this home has no running server"
    MlflowClient(uri).create_experiment("peft")
    return uri


# ---- chorus -----------------------------------------------------------------------------------------------


class Chorus:
    """What `chorus run` is made of, kept up from one round to the next."""

    def __init__(
        self, setting: Setting, load: Load, store: Store, registry: Registry, cluster: Cluster, home: Home
    ) -> None:
        self.setting, self.load, self.store = setting, load, store
        self.controller = Controller(store, cluster, registry, home.folder)
        self.controller.recover()

    def warm_up(self, turn: int) -> None:
        """Returns when a job of three steps has trained: the host is up and its trace complete.

        Its score is still to come, so the host stays.
        """
        run = self._submit(f"warm{turn}", jobs=1, steps=3, first_seed=1000 * turn)
        self._until(lambda: self.store.jobs(run)[0].step == 3)

    def run(self, turn: int) -> tuple[float, float]:
        """Seconds from reading the file until the last job has trained, and until it has ended."""
        started = time.perf_counter()
        run = self._submit(f"round{turn}", self.load.jobs, self.load.steps, 1000 * turn + 1)
        self._until(lambda: all(job.step == self.load.steps for job in self.store.jobs(run)))
        trained = time.perf_counter() - started
        self._until(lambda: all(job.status.finished for job in self.store.jobs(run)))
        seconds = time.perf_counter() - started
        self._until(lambda: False)
        failed = [job for job in self.store.jobs(run) if job.status is not Status.SUCCEEDED]
        if failed:
            raise RuntimeError(f"{failed[0].name} {failed[0].status}: {failed[0].message}")
        return trained, seconds

    def _submit(self, name: str, jobs: int, steps: int, first_seed: int) -> str:
        file = _write_pipeline(self.setting, self.load, name, jobs, steps, first_seed)
        return self.store.submit(new_run(make_plan(load_pipeline(file), {}), {}))

    def _until(self, reached: Callable[[], bool]) -> None:
        """As `Controller.run` does, but stopping early; at the latest when there is nothing to do."""
        while self.controller.tick() and not reached():
            self.controller.rest()


def _write_world(setting: Setting, load: Load) -> None:
    base_folder(setting.folder, setting.shape)
    base = {
        "model": f"base-{setting.shape}",
        "world_size": load.ranks,
        "slots": load.jobs + 1,
        "tokens_per_tick": 4096,
        "deepspeed": PERSISTENT[setting.shape],
    }
    (setting.folder / "base.yaml").write_text(yaml.safe_dump(base))
    for split, rows in (("train", 128), ("test", 4)):
        write_rows(setting.folder / f"chat/{split}.jsonl", chat_rows(rows, rows, TOKENS))


def _write_pipeline(setting: Setting, load: Load, name: str, jobs: int, steps: int, first_seed: int) -> Path:
    defaults = {
        "version": 1,
        "base_model": "base.yaml",
        "datasets": [{"path": "chat", "type": "chat"}],
        "sequence_len": TOKENS,
        "lora_r": R,
        "lora_alpha": 2 * R,
        "global_batch_size": load.ranks,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "evals_per_epoch": 0,
        "evaluation": {"generate_samples": 0},
    }
    each = [
        {"name": f"job{index}", "task": f"{name}-{index}", "seed": first_seed + index}
        for index in range(jobs)
    ]
    file = setting.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "name": name, "defaults": defaults, "jobs": each}))
    return file


# ---- a process for each job -------------------------------------------------------------------------------


def run_processes(orders: Sequence[Order], folder: Path) -> list[dict[str, float]]:
    """All orders, two at a time, in the order they come free; the seconds of each one's parts.

    Raises RuntimeError with the last words of a process that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(lambda order: _run_process(order, folder), orders))


def _run_process(order: Order, folder: Path) -> dict[str, float]:
    file = folder / f"{order.name}.json"
    file.write_text(json.dumps(asdict(order)))
    command = [sys.executable, "-m", "tests.bench.peft_process", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {order.name} failed: {done.stderr.strip()[-500:]}")
    parts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**parts, "whole process": time.perf_counter() - started}


def _order(setting: Setting, load: Load, uri: str, turn: int, index: int) -> Order:
    name = f"peft-{turn}-{index}"
    return Order(
        name=name,
        base=str(base_folder(setting.folder, setting.shape)),
        data=str(setting.folder / "chat/train.jsonl"),
        out=str(setting.folder / "peft" / name),
        tracking_uri=uri,
        steps=load.steps,
        batch=load.ranks,
        sequence_len=TOKENS,
        r=R,
        learning_rate=LEARNING_RATE,
        seed=1000 * turn + index,
    )
