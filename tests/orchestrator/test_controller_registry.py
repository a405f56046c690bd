"""A registry that hangs, or answers late, beside a controller that goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.contracts import RegistryUnreachable
from orchestrator.control import controller as loop
from orchestrator.control.errands import AT_ONCE, Errands, on_a_thread
from orchestrator.job import Reason, Status
from tests.contract.memory_registry import MemoryRegistry
from tests.contract.samples import killed_in_its_move
from tests.orchestrator.fakes import Later
from tests.orchestrator.recipe_files import finance, support, write_world
from tests.orchestrator.test_controller import FINANCE, World, tick_until

pytestmark = pytest.mark.usefixtures("unsynced")

PATIENCE = 20.0
"""Seconds after which a call that hangs gives up, as one does whose server hangs."""


class HangingRegistry:
    """Calls of one method hang, each for PATIENCE or until `goes_on`; `asked` is set once one does."""

    def __init__(self, inner: MemoryRegistry) -> None:
        self.inner = inner
        self.hangs_at = ""
        self.asked = threading.Event()
        self.goes_on = threading.Event()
        self.given_up = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == self.hangs_at:
                self.asked.set()
                if not self.goes_on.wait(PATIENCE):
                    self.given_up += 1
                    raise RegistryUnreachable("the registry does not answer")
            return getattr(self.inner, name)(*arguments, **named)

        return call


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    registry = HangingRegistry(MemoryRegistry(tmp_path / "registry"))
    made = World(tmp_path, registry)
    yield made
    registry.goes_on.set()
    made.store.close()


def to_the_end(world: World, controller: Any) -> None:
    while controller.tick():
        controller._errands.finish(PATIENCE)
        world.now += 1.0


@pytest.mark.parametrize("call", ["log_metrics", "register", "conditions"])
def test_registry_that_hangs_keeps_nobody_from_being_placed_and_no_loss_from_being_found(world, call):
    """While a call hangs: threads do it, and the controller's rounds go on."""
    world.registry.hangs_at = call
    world.submit(finance(max_steps=4))
    controller = world.controller(start=on_a_thread)
    controller.recover()
    tick_until(world, controller, lambda: world.registry.asked.wait(0.01))
    world.submit(support(max_steps=30))
    tick_until(world, controller, lambda: world.job("support").step >= 3, 20)
    world.faults.lose_at.add(world.cluster.polls + 1)
    tick_until(world, controller, lambda: world.job("support").attempt == 2, 3)
    assert world.registry.given_up == 0, "it hangs still"
    assert not world.job("finance").status.finished
    world.registry.goes_on.set()
    to_the_end(world, controller)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert [version.version for version in world.registry.versions(FINANCE)] == [1]
    losses = [step for run in world.registry.inner.runs.values() for key, step in run.points if key == "loss"]
    assert sorted(losses) == sorted([*range(1, 5), *range(1, 31)])


def test_registry_that_hangs_does_not_keep_the_controller_from_ending(world, monkeypatch):
    monkeypatch.setattr(loop, "CLOSE_SECONDS", 0.05)
    world.registry.hangs_at = "register"
    world.submit(finance())
    controller = world.controller(start=on_a_thread)
    controller.recover()
    tick_until(world, controller, lambda: world.registry.asked.wait(0.01))
    controller.close()
    assert world.registry.given_up == 0
    job = world.job("finance")
    assert (job.status, job.reason) == (Status.WAITING, Reason.INTERRUPTED)
    world.registry.goes_on.set()
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED
    assert len(world.registry.versions()) == 1


def late(world: World, until: Callable[[], bool]) -> tuple[Any, Later]:
    """A controller up to a moment from which on the registry answers only when it is told to."""
    answers = Later()
    controller = world.controller(start=answers)
    controller.recover()
    tick_until(world, controller, until)
    answers.held = True
    return controller, answers


def test_job_cancelled_while_it_is_registered_stays_cancelled(world):
    world.submit(finance())
    controller, answers = late(world, lambda: world.job("finance").step == 5)
    tick_until(world, controller, lambda: world.job("finance").status is Status.STOPPING)
    world.store.request(world.job("finance").id, "cancel")
    tick_until(world, controller, lambda: world.job("finance").status is Status.CANCELLED, 3)
    events = world.store.events(world.job("finance").id)
    answers.held = False
    answers.do()
    for _ in range(10):
        controller.tick()
        world.now += 1.0
    assert world.store.events(world.job("finance").id) == events
    assert [run.status for run in world.registry.inner.runs.values()] == ["KILLED"]


def test_job_paused_while_it_is_registered_is_registered_once_and_ends_when_resumed(world):
    world.submit(finance())
    controller, answers = late(world, lambda: world.job("finance").step == 5)
    tick_until(world, controller, lambda: bool(answers.waiting))
    for kind in ("pause", "resume"):
        world.store.request(world.job("finance").id, kind)
        controller.tick()
    assert world.job("finance").reason is Reason.RESUMED_BY_USER, "it waits for what it asked for"
    answers.held = False
    answers.do()
    to_the_end(world, controller)
    assert world.job("finance").status is Status.SUCCEEDED
    assert len(world.registry.versions()) == 1


def test_versions_of_one_name_are_registered_and_promoted_one_after_the_other(world):
    asked: list[tuple[str, str]] = []

    class Noting(MemoryRegistry):
        def register(self, new):
            asked.append(("register", new.name))
            return super().register(new)

        def promote(self, name, *rest):
            asked.append(("promote", name))
            return super().promote(name, *rest)

    world.registry = Noting(world.folder / "noting")
    world.submit(finance(), finance(name="again", seed=7), support())
    controller, answers = late(world, lambda: {job.step for job in world.store.jobs()} == {5})
    while controller.tick():
        assert len(answers.waiting) <= AT_ONCE
        if answers.waiting:
            answers.waiting.pop()()  # the last asked is answered first
        world.now += 1.0
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert [version.version for version in world.registry.versions(FINANCE)] == [1, 2]
    assert world.registry.version(FINANCE, "champion").version == 2
    assert [what for what, name in asked if name == FINANCE].count("promote") == 2


def test_champion_that_others_move_while_a_version_is_judged_is_judged_against_anew(world):
    """As by a `chorus promote` or `rollback` between the look at the champion and the move."""
    moves: list[int] = []
    judged: list[int] = []

    class Moved(MemoryRegistry):
        def conditions(self, name):
            if moves:
                judged.append(self._aliases[name]["champion"])
                self._aliases[name]["champion"] = moves.pop(0)
            return super().conditions(name)

    world.registry = Moved(world.folder / "moved")
    world.submit(finance(), finance(name="again", seed=7))
    world.run()
    world.submit(finance(name="third", seed=9))
    moves += [2, 1, 1]
    world.run()
    assert world.job("third").status is Status.SUCCEEDED, world.words()
    assert judged == [2, 2, 1], "for its card; beside 2, which another moves away; beside 1"
    assert world.registry.version(FINANCE, "champion").version == 3
    last = world.registry.history(FINANCE)[-1]
    assert (last.source, last.target) == (1, 3)


def test_promotion_that_was_interrupted_is_ended_by_the_next_controller(world):
    world.submit(finance())
    with killed_in_its_move(world.registry.inner):
        world.run()
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert [record.done for record in world.registry.history(FINANCE)] == [True]
    assert world.registry.version(FINANCE, "champion").tags["gate.status"] == "passed"


def test_registered_parent_that_was_deleted_is_told_in_a_sentence(world):
    world.submit_beside_registered("1")
    world.registry.inner._versions.clear()
    world.run()
    fused = world.job("fused")
    assert (fused.status, fused.reason) == (Status.FAILED, Reason.BAD_DATA), world.words()
    assert fused.message == f"{FINANCE} has no version or alias '1'"


def test_registered_parent_is_fetched_while_others_train(world):
    world.submit_beside_registered("champion")
    world.registry.hangs_at = "download"
    controller = world.controller(start=on_a_thread)
    controller.recover()
    tick_until(world, controller, lambda: world.registry.asked.wait(0.01))
    world.submit(support(name="other", seed=3))
    tick_until(world, controller, lambda: world.job("other").step >= 3, 20)
    assert world.registry.given_up == 0
    world.registry.goes_on.set()
    to_the_end(world, controller)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()


# ---- errands -------------------------------------------------------------------------------------------


def test_errands_on_one_lane_go_one_at_a_time_and_on_all_lanes_a_few():
    later = Later()
    later.held = True
    errands = Errands(later)
    heard: list[int] = []
    for number in range(AT_ONCE):
        assert errands.free({f"lane {number}"})
        errands.begin({f"lane {number}"}, lambda: 1, lambda answer: bool(heard.append(answer.result())))
        assert not errands.free({f"lane {number}"})
    assert not errands.free({"another lane"})
    assert not errands.hear()
    later.do()
    assert errands.hear(), "somebody was turned away, and there is a way now"
    assert heard == [1] * AT_ONCE
    assert errands.free({"lane 0"})
    assert not errands.hear()


@pytest.mark.parametrize("comes_again", [False, True])
def test_answer_makes_way_for_who_was_turned_away_but_not_for_who_comes_again_by_itself(comes_again):
    asked: list[Callable[[], None]] = []
    errands = Errands(asked.append)
    for lane in map(str, range(AT_ONCE)):
        errands.begin({lane}, lambda: None, lambda _: False)
    assert not errands.free({"another"}, comes_again)
    asked.pop()()
    assert errands.hear() is not comes_again
