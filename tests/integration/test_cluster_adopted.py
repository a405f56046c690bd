"""A controller killed over a host in training: the next one has it, and no step is done twice.

Real Ray, two ranks, a controller in a process of its own; the last one in this process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.cluster import gang
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run, read_order
from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.store import Store
from tests.chaos.controllers import work
from tests.chaos.raylets import job, make_files
from tests.contract.memory_registry import MemoryRegistry
from tests.integration.conftest import poll_until
from tests.integration.test_cluster_faults import ranks
from tests.orchestrator.recipe_files import pipeline, write_yaml
from workers.types import Attach, Attached, Detach, Superseded, TrainingFinished

SECONDS = 120.0
STEPS = 250


def controller_of(folder: Path, cluster: Any, store: Store) -> Controller:
    return Controller(store, cluster, MemoryRegistry(folder / "registry"), folder / "home")


def begin(folder: str, home: str, address: str) -> None:
    """In a process of its own."""
    work(Path(folder), Path(home), address, MemoryRegistry(Path(folder) / "registry"))


@dataclass
class World:
    folder: Path
    store: Store
    ray_home: Path

    @contextmanager
    def controller(self):
        """Killed at the end, if it still lives."""
        address = ray.get_runtime_context().gcs_address
        script = "import sys; from tests.integration import test_cluster_adopted as t; t.begin(*sys.argv[1:])"
        command = [sys.executable, "-c", script, str(self.folder), str(self.ray_home), address]
        with (self.folder / "out.txt").open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def job(self):
        return self.store.jobs()[0]

    def wait_until(self, done: Any, process: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            said = (self.folder / "out.txt").read_text()
            assert process is None or process.poll() is None, said
            assert time.monotonic() < deadline, (self.job, said)
            time.sleep(0.02)

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes]) -> None:
        self.wait_until(lambda: self.job.step >= step, process)


@pytest.fixture
def world(tmp_path, ray_home):
    make_files(tmp_path, {"pair": 2})
    recipe = write_yaml(tmp_path / "demo.yaml", pipeline(job("finance", "pair", STEPS)))
    with closing(Store.open(tmp_path / "home" / "chorus.db")) as store:
        store.submit(new_run(make_plan(load_pipeline(recipe))))
        yield World(tmp_path, store, ray_home)


def weights(folder: str) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_cluster_controller_killed_leaves_its_host_to_the_next_and_no_step_is_done_twice(
    world, ray_cluster, monkeypatch
):
    with world.controller() as first:
        world.wait_for_step(10, first)
    processes = ranks()
    assert len(processes) == 2
    second, events = controller_of(world.folder, ray_cluster, world.store), []
    second.recover()
    assert (world.job.status, world.job.attempt) == (Status.RUNNING, 1)
    poll = ray_cluster.poll
    ray_cluster.poll = lambda host: events.extend(found := poll(host)) or found
    try:
        world.wait_until(lambda: second.tick() and events)
        (stale,) = ray_cluster._gangs.values()
        third = controller_of(world.folder, ray_cluster, world.store)
        third.recover()
        refused(stale, world)
        world.wait_until(lambda: third.tick() and trained(events))
    finally:
        del ray_cluster.poll
    assert {rank.pid for rank in ranks()} == {rank.pid for rank in processes}
    assert not [event for event in events if isinstance(event, Attached)]
    reasons = [event.reason for event in world.store.events(world.job.id)]
    assert reasons[:3] == [Reason.SUBMITTED, Reason.PLACED, Reason.ATTACHED]
    assert Reason.CONTROLLER_RESTARTED not in reasons
    assert [(row.step, row.attempt) for row in world.store.metrics(world.job.id)] == [
        (step, 1) for step in range(1, STEPS + 1)
    ]
    assert weights(trained(events)) == weights(undisturbed(world, ray_cluster))
    with pytest.raises(Superseded):
        again_and_again(second.tick)
    monkeypatch.setattr(gang, "code_digest", lambda: "of a later version")
    assert ray_cluster.adopt(world.store.epochs.begin("later")) == [], "its ranks run what is not ours"
    assert psutil.wait_procs(processes, timeout=SECONDS)[1] == []


def refused(stale: gang.Gang, world: World) -> None:
    """A controller that was kept elsewhere while another came can do nothing to its host any more."""
    stale.send(Detach(world.job.id, 1))
    stale.take_away()
    for ask in (lambda: stale.collect(SECONDS), lambda: stale.failure(wait=True)):
        with pytest.raises(Superseded, match="has taken over from this one"):
            again_and_again(ask)


def again_and_again(ask) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ask()


def trained(events) -> str | None:
    """The adapter's folder, once it is there."""
    return next((event.adapter_dir for event in events if isinstance(event, TrainingFinished)), None)


def undisturbed(world: World, cluster) -> str:
    """The same training under another name, on the same host, by nobody's controller."""
    train = read_order(world.job.plan).job.step("train").what
    host = next(iter(cluster._gangs))
    spec = train.attempt("undisturbed", 1, str(world.folder / "undisturbed"), str)
    cluster.send(host, Attach(spec))
    events = poll_until(
        cluster, host, lambda event: isinstance(event, TrainingFinished) and event.job == "undisturbed"
    )
    return trained([event for event in events if getattr(event, "job", "") == "undisturbed"])


def test_cluster_host_that_lost_a_rank_while_no_controller_lived_is_taken_away_and_its_job_goes_on(
    world, ray_cluster
):
    with world.controller() as first:
        world.wait_for_step(25, first)
    processes = ranks()
    processes[1].kill()
    world.wait_until(lambda: len(ray.util.list_named_actors()) < 2)  # Ray knows
    controller = controller_of(world.folder, ray_cluster, world.store)
    controller.recover()
    assert (world.job.status, world.job.reason) == (Status.WAITING, Reason.CONTROLLER_RESTARTED)
    assert psutil.wait_procs(processes, timeout=SECONDS)[1] == []
    world.wait_until(lambda: not controller.tick())
    assert (world.job.status, world.job.attempt) == (Status.SUCCEEDED, 2)
    controller.close()
