"""A controller killed at any moment and started again ends where an undisturbed one does, nothing doubled."""

from __future__ import annotations

from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.job import Status
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import Fuse, Killed, Mortal
from tests.orchestrator.recipe_files import finance, support, write_world
from tests.orchestrator.test_controller import World

pytestmark = pytest.mark.usefixtures("unsynced")


def make_world(folder: Path) -> World:
    folder.mkdir()
    write_world(folder)
    world = World(folder, MemoryRegistry(folder / "registry"))
    world.submit(finance(max_steps=3), support(max_steps=4), release={"out": "released"})
    return world


def outcome(world: World) -> dict[str, Any]:
    """All that a run leaves behind, without what may differ: times, attempts, MLflow's random ids."""
    registry = world.registry
    return {
        "statuses": world.statuses(),
        "versions": [(v.name, v.version, v.digest, v.aliases, v.metrics) for v in registry.versions()],
        "gates": [v.tags["gate.status"] for v in registry.versions()],
        "runs": sorted((run.name, run.status, sorted(run.points.items())) for run in registry.runs.values()),
        "releases": sorted(
            ((move.name, move.source, move.target) for move in registry.releases), key=itemgetter(0)
        ),
        "released": sorted(path.name for path in (world.folder / "released").iterdir()),
        "steps": Counter(row.kind for row in world.store.steps.read().values()),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("undisturbed") / "world")
    world.run()
    found = outcome(world)
    world.store.close()
    assert set(found["statuses"].values()) == {Status.SUCCEEDED}
    return found


def same(world: World, undisturbed: dict[str, Any]) -> None:
    found = outcome(world)
    runs, expected = found.pop("runs"), undisturbed["runs"]
    assert found == {key: value for key, value in undisturbed.items() if key != "runs"}
    assert [run[:2] for run in runs] == [run[:2] for run in expected]
    for (_, _, points), (_, _, whole) in zip(runs, expected, strict=True):
        # What a host reported and the controller did not live to write down is in a checkpoint, but not in
        # the curve: that may lack the step of each such moment, and never has a wrong one.
        assert dict(points).items() <= dict(whole).items()
        lost = {step for (_, step), _ in set(whole) - set(points)}
        assert len(lost) <= world.deaths


def test_controller_stopped_after_any_tick_and_started_again_ends_the_same(tmp_path, undisturbed):
    finished_at = None
    for ticks in range(1, 100):
        world = make_world(tmp_path / f"after-{ticks}")
        controller = world.controller()
        controller.recover()
        going = [controller.tick() for _ in range(ticks)]
        world.cluster.close()
        world.deaths += 1
        world.run()
        same(world, undisturbed)
        world.store.close()
        if not going[-1]:
            finished_at = ticks
            break
    assert finished_at is not None
    assert finished_at > 10


def kill_after(world: World, calls: int) -> bool:
    """Start a controller that dies at its n-th call of the store, the cluster or the registry; did it?"""
    fuse = Fuse(calls)
    parts = {name: Mortal(getattr(world, name), fuse) for name in ("store", "registry")}
    try:
        controller = world.controller(**parts)
        controller.recover()
        while controller.tick():
            world.now += 1.0
    except Killed:
        world.deaths += 1
        return True
    finally:
        world.cluster.close()
    return False


@pytest.mark.parametrize("start", range(1, 8))
def test_controller_killed_between_any_two_calls_and_started_again_ends_the_same(
    tmp_path, undisturbed, start
):
    calls = start
    while True:
        world = make_world(tmp_path / f"calls-{calls}")
        died = kill_after(world, calls)
        world.run()
        same(world, undisturbed)
        world.store.close()
        if not died:
            break
        calls += 49
    assert calls > 100


def test_controller_killed_again_and_again_still_comes_to_the_end(tmp_path, undisturbed):
    world = make_world(tmp_path / "again")
    deaths = sum(kill_after(world, calls) for calls in range(40, 400, 23))
    world.run()
    same(world, undisturbed)
    world.store.close()
    assert deaths > 3
