"""An MLflow server that hangs (SIGSTOP) while versions are registered: the controller works on meanwhile."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.control.errands import on_a_thread
from orchestrator.job import Status
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.chaos.tracking import serving, stop
from tests.orchestrator.recipe_files import finance, support, write_world
from tests.orchestrator.test_controller import World

PATIENCE = 120.0


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    with tracking_server.start(tmp_path / "mlflow") as server:
        made = World(tmp_path, MlflowRegistry(server.url, lock=tmp_path / "lock"))
        yield made
        made.store.close()


def until(world: World, controller: Any, done: Callable[[], bool]) -> float:
    """Rounds of the controller until `done()`, a second of its clock each; seconds of the longest."""
    deadline, longest = time.monotonic() + PATIENCE, 0.0
    while not done():
        assert time.monotonic() < deadline, world.words()
        began = time.monotonic()
        controller.tick()
        longest = max(longest, time.monotonic() - began)
        world.now += 0.1
        controller._errands.finish(0.02)
    return longest


def test_server_that_hangs_while_versions_are_registered_holds_up_no_round(world, tmp_path):
    names = [f"job-{number}" for number in range(3)]
    world.submit(*(finance(name=name, task=name, seed=n, max_steps=4) for n, name in enumerate(names)))
    controller = world.controller(start=on_a_thread)
    controller.recover()
    until(world, controller, lambda: any(job.status is Status.STOPPING for job in world.store.jobs()))
    stopped = [process for process in serving(tmp_path / "mlflow") if stop(process)]
    assert stopped
    try:
        world.submit(support(max_steps=40))
        placed = until(world, controller, lambda: world.job("support").step >= 3)
        world.faults.lose_at.add(world.cluster.polls + 1)
        found = until(world, controller, lambda: world.job("support").attempt == 2)
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    # A request to a server that hangs takes 15 s, twice: no round had one in it.
    assert max(placed, found) < 10
    until(world, controller, lambda: not world.store.unfinished_jobs())
    controller.close()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    versions = world.registry.versions()
    assert sorted((version.name, version.version) for version in versions) == sorted(
        (f"tiny.{task}", 1) for task in (*names, "support")
    )
    assert all("champion" in version.aliases for version in versions)
    assert world.registry.audit() == []
