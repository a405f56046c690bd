"""A home lost with its controller, in the middle of a training: another one goes on from the object store.

Real hosts of one rank, S3 over HTTP, a controller in a process of its own; the last one in this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.api.views import why
from orchestrator.cluster.local import LocalCluster
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run
from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.store import Store
from tests.chaos.raylets import job, make_files
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.recipe_files import pipeline, write_yaml
from workers.object_store import ObjectStore
from workers.types import Attached

SECONDS = 120.0
STEPS = 80


class World:
    """One home: the same recipe, and what its host has reported."""

    def __init__(self, folder: Path, home: str, url: str) -> None:
        self.home = folder / home
        self.store = Store.open(self.home / "chorus.db")
        self.plan = make_plan(load_pipeline(folder / "demo.yaml"))
        self.store.submit(new_run(self.plan))
        cluster = LocalCluster()
        poll, self.heard = cluster.poll, []
        cluster.poll = lambda host: self.heard.extend(found := poll(host)) or found
        registry = MemoryRegistry(self.home / "registry")
        self.controller = Controller(self.store, cluster, registry, self.home, checkpoints=url)
        self.controller.recover()

    @property
    def job(self):
        return self.store.jobs()[0]

    def work(self, until) -> None:
        deadline = time.monotonic() + SECONDS
        while not until():
            assert time.monotonic() < deadline, (self.job.status, self.job.step, self.job.message)
            self.controller.tick()

    def weights(self) -> bytes:
        (file,) = self.home.glob("checkpoints/*/adapter/adapter_model.safetensors")
        return file.read_bytes()


def begin(folder: str, home: str, url: str) -> None:
    """In a process of its own, until killed."""
    World(Path(folder), home, url).work(lambda: False)


def wait_for(done, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert process.poll() is None, "it has ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path):
    make_files(tmp_path, {"one": 1})
    write_yaml(tmp_path / "demo.yaml", pipeline(job("finance", "one", STEPS)))
    return tmp_path


def test_another_home_goes_on_where_a_lost_one_was_and_waits_for_a_store_that_is_away(folder, s3):
    url = f"s3://{s3.bucket()}/checkpoints"
    script = "import sys; from tests.integration import test_checkpoints_s3 as t; t.begin(*sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", script, str(folder), "lost", url], env=os.environ.copy())
    (trained,) = (
        step.id
        for step in make_plan(load_pipeline(folder / "demo.yaml")).jobs[0].steps
        if step.kind == "train"
    )
    kept = ObjectStore(f"{url}/{trained}")
    try:
        wait_for(lambda: len(list(kept.whole("step-"))) == 2, child)
    finally:
        child.kill()
        child.wait()
    shutil.rmtree(folder / "lost")

    world = World(folder, "found", url)
    with closing(world.store):
        world.work(lambda: any(isinstance(event, Attached) for event in world.heard))
        (begun,) = (event.step for event in world.heard if isinstance(event, Attached))
        assert 10 <= begun < STEPS
        with s3.away():
            world.work(lambda: world.job.reason is Reason.CHECKPOINTS_AWAY)
            said = why(world.job)
        assert said.startswith("the object store of checkpoints does not answer; will be tried again")
        assert f"cannot save: {url}/{trained}: " in said
        assert "\n" not in said
        world.work(lambda: world.job.status.finished)
        assert world.job.status is Status.SUCCEEDED, world.job.message
        steps = [row.step for row in world.store.metrics(world.job.id)]
        assert steps == list(range(1, STEPS + 1)), "told again by the checkpoint that it came from"
        found = world.weights()
    assert [stored.name for stored in kept.whole("")] == [
        f"step-{STEPS:06d}",
        f"step-{STEPS - 10:06d}",
        "adapter",
    ]

    undisturbed = World(folder, "undisturbed", "")
    with closing(undisturbed.store):
        undisturbed.work(lambda: undisturbed.job.status.finished)
        assert undisturbed.weights() == found
