"""A controller killed at any moment while its hosts live on: the next one has them, nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.controller import Controller
from orchestrator.job import Reason, Status
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import Fuse, Killed, Mortal, at_once
from tests.orchestrator.lasting import Lasting, Machines
from tests.orchestrator.recipe_files import finance, support, write_world
from tests.orchestrator.test_controller import World
from tests.orchestrator.test_controller_restart import outcome
from tests.orchestrator.test_distillation import DISTILL
from tests.orchestrator.test_weight_search import SEARCH
from workers.types import Attach, Superseded

pytestmark = pytest.mark.usefixtures("unsynced")


@dataclass
class Lived(World):
    """A world whose hosts outlive its controllers."""

    machines: Machines = field(default_factory=Machines)

    def controller(self, run: str | None = None, **changes: Any) -> Controller:
        self.cluster = Lasting(self.machines, changes.pop("cpus", 2.0), self.faults)
        parts = {"store": self.store, "cluster": self.cluster, "registry": self.registry, "start": at_once}
        parts |= changes
        return Controller(**parts, home=self.folder / "home", run=run, clock=lambda: self.now)

    def tick_until(self, controller: Controller, done: Callable[[], bool], most: int = 100) -> None:
        for _ in range(most):
            if done():
                return
            controller.tick()
            self.now += 1.0
        raise AssertionError(self.words())

    def begun(self) -> Controller:
        controller = self.controller()
        controller.recover()
        return controller


def make_world(folder: Path, *jobs: dict[str, Any], **fusion: Any) -> Lived:
    folder.mkdir(exist_ok=True)
    write_world(folder)
    world = Lived(folder, MemoryRegistry(folder / "registry"))
    world.submit(*jobs, **fusion)
    return world


@pytest.fixture
def world(tmp_path):
    made = make_world(tmp_path / "world", finance(max_steps=30))
    yield made
    made.store.close()


def pipeline_world(folder: Path) -> Lived:
    return make_world(folder, finance(max_steps=3), support(max_steps=4), release={"out": "released"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    world = pipeline_world(tmp_path_factory.mktemp("undisturbed") / "world")
    world.run()
    found = outcome(world)
    world.store.close()
    assert set(found["statuses"].values()) == {Status.SUCCEEDED}
    return found


def kill_after(world: Lived, calls: int) -> bool:
    """A controller that dies at its n-th call of the store, the cluster or the registry; did it?"""
    fuse = Fuse(calls)
    cluster = Lasting(world.machines, 2.0, world.faults)
    parts = {"store": world.store, "registry": world.registry, "cluster": cluster}
    try:
        controller = world.controller(**{name: Mortal(part, fuse) for name, part in parts.items()})
        controller.recover()
        while controller.tick():
            world.now += 1.0
        controller.close()
    except Killed:
        world.deaths += 1
        return True
    return False


def done_once(world: Lived) -> None:
    machines = world.machines
    assert set(machines.steps.values()) == {1}, machines.steps
    assert set(machines.requests.values()) == {1}, machines.requests
    assert machines.hosts == {}


@pytest.mark.parametrize("start", range(1, 6))
def test_controller_killed_between_any_two_calls_has_its_hosts_taken_over_and_nothing_done_twice(
    tmp_path, undisturbed, start
):
    calls = start
    while True:
        world = pipeline_world(tmp_path / f"calls-{calls}")
        died = kill_after(world, calls)
        world.run()
        # With the hosts alive even the curves are whole, down to every point.
        assert outcome(world) == undisturbed, calls
        done_once(world)
        assert world.machines.opened == 1
        world.store.close()
        if not died:
            break
        calls += 73
    assert calls > 100


@pytest.mark.parametrize(
    "fusion",
    [
        {"rule": "distill", "rank": 8, "distill": DISTILL},
        {"rule": "svd", "rank": 4, "search": SEARCH},
    ],
    ids=["distilled", "searched"],
)
def test_controller_killed_again_and_again_leaves_nothing_to_be_done_twice(tmp_path, fusion):
    def made(name: str) -> Lived:
        jobs = finance(max_steps=3), support(max_steps=4)
        return make_world(tmp_path / name, *jobs, release={"out": "released"}, **fusion)

    calm, world = made("calm"), made("again")
    calm.run()
    deaths = sum(kill_after(world, calls) for calls in range(20, 500, 23))
    world.run()
    assert outcome(world) == outcome(calm)
    assert set(calm.statuses().values()) == {Status.SUCCEEDED}
    assert (world.machines.steps.keys(), world.machines.requests.keys()) == (
        calm.machines.steps.keys(),
        calm.machines.requests.keys(),
    )
    done_once(world)
    for each in (calm, world):
        each.store.close()
    assert deaths > 5


def trains(world: Lived) -> bool:
    return world.job("finance").status is Status.RUNNING and world.job("finance").step >= 3


def test_adopted_job_keeps_attempt_and_seat_and_is_not_attached_again(world):
    world.tick_until(world.begun(), lambda: trains(world))
    before = world.job("finance")
    for _ in range(5):
        world.machines.work("host-1")  # while nobody listens
    controller = world.begun()
    assert world.job("finance") == before, "it goes on as if nothing had been"
    (host,) = controller._work.fleet.hosts
    assert (host.name, host.residents, host.ready is None) == ("host-1", {before.id: 1}, False)
    assert world.cluster.capacity().cpus == 0.0
    controller.tick()
    assert world.job("finance").step == before.step + 6, "with what it did alone"
    world.tick_until(controller, lambda: world.job("finance").status.finished)
    assert world.cluster.asked("Attach") == []
    done_once_while_open(world)
    reasons = [event.reason for event in world.store.events(before.id)]
    assert Reason.CONTROLLER_RESTARTED not in reasons
    assert [row.step for row in world.store.metrics(before.id)] == list(range(1, 31))


def done_once_while_open(world: Lived) -> None:
    assert set(world.machines.steps.values()) == {1}
    assert set(world.machines.attached.values()) == {1}


def test_job_whose_host_went_while_no_controller_lived_goes_back_to_the_queue(world):
    world.tick_until(world.begun(), lambda: trains(world))
    Lasting(world.machines).stop_host("host-1")
    controller = world.begun()
    job = world.job("finance")
    assert (job.status, job.reason, job.host) == (Status.WAITING, Reason.CONTROLLER_RESTARTED, None)
    world.tick_until(controller, lambda: world.job("finance").status.finished)
    assert (world.job("finance").status, world.job("finance").attempt) == (Status.SUCCEEDED, 2)


def test_job_cancelled_while_no_controller_lived_leaves_its_slot(world):
    world.tick_until(world.begun(), lambda: trains(world))
    world.store.request(world.job("finance").id, "cancel")
    controller = world.begun()
    world.tick_until(controller, lambda: not any(host.residents for host in controller._work.fleet.hosts))
    assert world.job("finance").status is Status.CANCELLED
    assert world.machines.hosts["host-1"].residents == {}


def test_attempt_that_the_store_does_not_want_any_more_is_told_to_leave_and_holds_its_slot_until_then(world):
    """As when the controller died between the status and the command."""
    world.tick_until(world.begun(), lambda: trains(world))
    job = world.store.switch_status(world.job("finance").id, Reason.PREEMPTED)
    controller = world.begun()
    (host,) = controller._work.fleet.hosts
    assert host.residents == {job.id: 1}
    world.tick_until(controller, lambda: world.job("finance").status.finished)
    assert (world.job("finance").status, world.job("finance").attempt) == (Status.SUCCEEDED, 2)
    assert world.machines.attached == {(job.id, 1): 1, (job.id, 2): 1}


def test_host_with_an_attempt_whose_next_has_begun_elsewhere_is_closed(world):
    world.tick_until(world.begun(), lambda: trains(world))
    job = world.job("finance").id
    world.store.switch_status(job, Reason.HOST_LOST)
    world.store.switch_status(job, Reason.PLACED, host="host-9")
    controller = world.begun()
    assert world.machines.hosts == {}
    assert controller._work.fleet.hosts == ()
    assert world.job("finance").status is Status.WAITING


def test_host_that_no_unfinished_job_needs_is_closed(world):
    world.tick_until(world.begun(), lambda: trains(world))
    world.store.switch_status(world.job("finance").id, Reason.CANCELLED_BY_USER)
    world.begun()
    assert world.machines.hosts == {}


def test_new_host_takes_no_name_of_one_that_was_taken_over(tmp_path):
    world = make_world(tmp_path / "world", finance(max_steps=30))
    world.tick_until(world.begun(), lambda: trains(world))
    assert world.begun()._work.fleet.next_number == 2
    world.store.close()


def test_controller_that_another_has_taken_over_from_stops_and_touches_nothing(world):
    first = world.begun()
    world.tick_until(first, lambda: trains(world))
    second = world.begun()
    events = world.store.last_event()
    with pytest.raises(Superseded, match="has taken over from this one"):
        world.tick_until(first, lambda: False)
    assert world.store.last_event() == events
    assert list(world.machines.hosts) == ["host-1"]
    world.tick_until(second, lambda: world.job("finance").status.finished)
    done_once_while_open(world)


def test_run_of_a_controller_that_was_superseded_closes_nothing(world):
    first = world.controller()
    taken_over = []

    def take_over() -> None:
        if trains(world) and not taken_over:
            taken_over.append(world.begun())

    with pytest.raises(Superseded):
        first.run(take_over, wait=lambda _: None)
    assert world.job("finance").status is Status.RUNNING
    assert list(world.machines.hosts) == ["host-1"]
    (second,) = taken_over
    world.tick_until(second, lambda: world.job("finance").status.finished)
    assert [command.job.attempt for command in world.cluster.asked(Attach.__name__)] == []
