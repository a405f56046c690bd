"""The restart promise: `chorus run` killed by SIGKILL again and again ends as if nobody had touched it.

The same pipeline runs once undisturbed and once killed at seeded moments: some so long after a start, some
just after something came into being on disk. Then adapters, versions and curves are compared. CHORUS_KILLS
says how often, 10 at most; the suite is content with three, for each kill costs a start.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.registry import server as tracking_server
from tests.models import make_base, write_rows
from tests.orchestrator.recipe_files import LABELS, fuse, pipeline, write_yaml
from workers.manifest import folder_digest, verify_folder

STEPS = 60
KILLS = int(os.environ.get("CHORUS_KILLS", "3"))
PATIENCE = 240.0
"""Seconds a run may take on a busy machine."""

SHORT = {"version": 1, "base_model": "bases/tiny.yaml", "sequence_len": 96, "global_batch_size": 4}
SHORT |= {"max_steps": STEPS, "learning_rate": 1e-2, "lora_r": 4, "saves_per_epoch": 8, "evals_per_epoch": 2}


@dataclass(frozen=True)
class After:
    """A kill up to `jitter` seconds after `count` paths below the home match; any do an empty pattern."""

    pattern: str = ""
    count: int = 1
    jitter: float = 0.3


STARTING = After(jitter=6)
FIRST_CHECKPOINT = After("checkpoints/*/step-*")
HALF_TRAINED = After("checkpoints/*/step-*[3-5]?")
EVALUATING = After("checkpoints/*/adapter", jitter=1)
REGISTERING = After("mlflow/artifacts/*/models/*")
REGISTERING_SECOND = After("mlflow/artifacts/*/models/*", 2)
FUSING = After("fusions/*")
REGISTERING_FUSED = After("mlflow/artifacts/*/models/*", 3)
MOMENTS = (
    *(STARTING, FIRST_CHECKPOINT, STARTING, HALF_TRAINED, EVALUATING),
    *(STARTING, REGISTERING, REGISTERING_SECOND, FUSING, REGISTERING_FUSED),
)


@dataclass(frozen=True)
class World:
    """One folder with a pipeline, its data and its own home."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def home(self) -> Path:
        return self.folder / ".chorus"

    def command(self) -> list[str]:
        return [sys.executable, "-u", "-m", "orchestrator.main", "run", "demo.yaml", *self.flags]

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "out.txt").open("ab") as out:
            return subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=out,
            )

    def finish(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """Let a run, this one or a new one, come to its end."""
        process = process or self.start()
        try:
            assert process.wait(PATIENCE) == 0, self.said()
        finally:
            process.kill()

    def killed(self, after: After, chance: random.Random) -> None:
        """Start, and kill the command alone at that moment. One that ends before fails: it must be longer."""
        process = self.start()
        try:
            self.wait_for(after, process)
            process.wait(chance.uniform(0, after.jitter))
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, self.said()

    def wait_for(self, after: After, process: subprocess.Popen[bytes]) -> None:
        """Until the pattern of `after` matches, without its jitter."""
        deadline = time.monotonic() + PATIENCE
        while after.pattern and len(list(self.home.glob(after.pattern))) < after.count:
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, (after, self.said())
            time.sleep(0.01)

    def said(self) -> str:
        log = self.home / "logs" / "chorus.log"
        return (self.folder / "out.txt").read_text() + (log.read_text() if log.exists() else "")


def left_behind(world: World) -> dict[str, object]:
    """All that a run leaves, without what may differ between two: times, and MLflow's random ids."""
    from mlflow.tracking import MlflowClient

    from orchestrator.registry.registry import MlflowRegistry

    with tracking_server.start(world.home) as server:
        registry, client = MlflowRegistry(server.url), MlflowClient(server.url)
        versions = sorted(registry.versions(), key=lambda version: (version.name, version.version))
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        models = client.search_logged_models(everywhere)
        assert sorted(model.model_id for model in models) == sorted(version.model_id for version in versions)
        return {
            "versions": [(version.name, version.version, version.aliases) for version in versions],
            "status": {client.get_model_version(v.name, str(v.version)).status for v in versions},
            "models": [str(model.status) for model in models],
            "adapters": [downloaded(registry, world, version) for version in versions],
            "metrics": [version.metrics for version in versions],
            "runs": sorted(
                (run.info.run_name, run.info.status, len(run.outputs.model_outputs))
                for run in client.search_runs(everywhere)
            ),
            "curves": [curves(client, version.run_id) for version in versions],
            "released": verify_folder(world.folder / "release/fused")["files"]["adapter_model.safetensors"],
        }


def downloaded(registry, world: World, version) -> tuple[str, bytes]:
    """Digest and weights of a version's adapter, as they lie in the registry."""
    folder = registry.download(version, world.folder / "downloaded" / version.name)
    assert folder_digest(folder) == version.digest
    return version.digest, (folder / "adapter_model.safetensors").read_bytes()


def curves(client, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every point of what does not depend on the clock, in the order of steps."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def assert_whole(found: dict[str, object]) -> None:
    """What must hold of any run, disturbed or not."""
    names = ("tiny.finance-sentiment", "tiny.multitask", "tiny.support")
    assert [version[:2] for version in found["versions"]] == [(name, 1) for name in names]
    assert (found["status"], found["models"]) == ({"READY"}, ["READY"] * 3)
    for trained in (found["curves"][0], found["curves"][2]):
        assert [step for step, _ in trained["loss"]] == list(range(1, STEPS + 1))


@pytest.mark.timeout(1200)
def test_run_killed_locally_ends_like_an_undisturbed_one(tmp_path):
    world, chance = make_world(tmp_path / "killed", 1, "--local"), random.Random(20261122)
    undisturbed = make_world(tmp_path / "undisturbed", 1, "--local")
    beside = undisturbed.start()
    try:
        for after in moments(KILLS):
            world.killed(after, chance)
        world.finish()
        undisturbed.finish(beside)
    finally:
        beside.kill()
    expected = left_behind(undisturbed)
    assert_whole(expected)
    assert left_behind(world) == expected


@pytest.mark.timeout(3000)
def test_run_killed_on_two_ranks_ends_like_an_undisturbed_one(tmp_path):
    undisturbed = make_world(tmp_path / "undisturbed", 2, "--cpus", "2")
    undisturbed.finish()
    expected = left_behind(undisturbed)
    assert_whole(expected)
    world, chance = make_world(tmp_path / "killed", 2, "--cpus", "2"), random.Random(20261122)
    for after in moments(KILLS):
        world.killed(after, chance)
    world.finish()
    assert left_behind(world) == expected


def moments(count: int) -> list[After]:
    """`count` of MOMENTS, those that tell most first chosen, in the order of a run."""
    chosen = (1, 3, 6, 0, 8, 4, 7, 2, 9, 5)[:count]
    assert len(chosen) == count > 0, f"CHORUS_KILLS is {count}; there are 1 to {len(MOMENTS)} moments"
    return [MOMENTS[number] for number in sorted(chosen)]


def make_world(folder: Path, ranks: int, *flags: str) -> World:
    make_base(folder / "bases" / "tiny")
    write_yaml(folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": ranks, "tokens_per_tick": 512})
    for split in ("train", "validation", "test"):
        count = 96 if split == "train" else 8
        write_rows(folder / f"data/finance/{split}.jsonl", [headline(split, n) for n in range(count)])
        write_rows(folder / f"data/support/{split}.jsonl", [dialogue(split, n) for n in range(count)])
    block = fuse(rule="svd", rank=6, release={"out": "release/fused"})
    write_yaml(folder / "demo.yaml", pipeline(finance(), support(), fuse=block))
    return World(folder, flags)


def finance():
    datasets = [{"path": "data/finance", "type": "classification", "labels": LABELS}]
    return {**SHORT, "name": "finance", "task": "finance-sentiment", "datasets": datasets}


def support():
    datasets = [{"path": "data/support", "type": "chat"}]
    replies = {"generate_samples": 2, "max_new_tokens": 4}
    job = {**SHORT, "name": "support", "task": "support", "datasets": datasets, "evaluation": replies}
    return {**job, "lora_r": 8, "use_rslora": True, "lora_dropout": 0.1}


def headline(split, n):
    return {"text": f"{split} headline {n}", "label": LABELS[n % 3]}


def dialogue(split, n):
    turns = (("user", f"{split}: where is {n}?"), ("assistant", f"{n} is on its way"))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
