"""The controller on a cluster and a registry in memory: whole runs, and what may go wrong in them."""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.service import HomeService
from orchestrator.commands.progress import RunProgress
from orchestrator.contracts import RegistryUnreachable, TaskResult
from orchestrator.control import pace
from orchestrator.control.controller import Controller
from orchestrator.control.show import read_progress
from orchestrator.control.submission import new_run
from orchestrator.home import Home
from orchestrator.job import REASONS, Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.scheduler import schedule
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import METRICS, FakeCluster, Faults, Killed, at_once
from tests.orchestrator.recipe_files import finance, fuse, pipeline, support, write_world, write_yaml
from workers.types import BadInput

pytestmark = pytest.mark.usefixtures("unsynced")

FINANCE, SUPPORT, FUSED = "tiny.finance-sentiment", "tiny.support", "tiny.multitask"


@dataclass
class World:
    """A home with one store and one registry, in which controllers come and go."""

    folder: Path
    registry: Any
    faults: Faults = field(default_factory=Faults)
    now: float = 1000.0
    deaths: int = 0
    cluster: FakeCluster = field(default_factory=FakeCluster)

    def __post_init__(self) -> None:
        self.store = Store(f"sqlite:///{self.folder}/home/chorus.db", clock=lambda: self.now)

    def submit(self, *jobs: dict[str, Any], digests: dict[str, str] | None = None, **fusion: Any) -> str:
        recipe = pipeline(*jobs, fuse=fuse(**fusion) if fusion else None)
        path = write_yaml(self.folder / "pipeline.yaml", recipe)
        return self.store.submit(new_run(make_plan(load_pipeline(path), digests), digests))

    def submit_beside_registered(self, ref: str, digest: str | None = None, **fusion: Any) -> str:
        """A fusion of `support` and of a finance adapter that another run has registered."""
        self.submit(finance())
        self.run()
        write_yaml(self.folder / "finance.yaml", finance())
        reference = f"{FINANCE}@{ref}"
        parents = [{"adapter": reference, "recipe": "finance.yaml"}, {"job": "support"}]
        digests = {reference: digest or self.registry.version(FINANCE, ref).digest}
        return self.submit(support(), digests=digests, adapters=parents, **fusion)

    def controller(self, run: str | None = None, **changes: Any) -> Controller:
        self.cluster = FakeCluster(faults=self.faults, cpus=changes.pop("cpus", 2.0))
        parts = {"store": self.store, "cluster": self.cluster, "registry": self.registry, "start": at_once}
        parts |= changes
        return Controller(**parts, home=self.folder / "home", run=run, clock=lambda: self.now)

    def run(self, run: str | None = None, most: int = 300, on_tick: Any = None, **changes: Any) -> None:
        """Until all is done; a second of the clock a tick. A loop that does not end is a failure."""
        ticks = 0

        def wait(_: float) -> None:
            nonlocal ticks
            ticks += 1
            self.now += 1.0
            assert ticks < most, self.words()

        self.controller(run, **changes).run(on_tick or (lambda: None), wait)

    def job(self, name: str) -> JobRow:
        return next(job for job in reversed(self.store.jobs()) if job.name == name)

    def words(self) -> list[tuple[str, Status, Reason, str]]:
        return [(job.name, job.status, job.reason, job.message) for job in self.store.jobs()]

    def statuses(self) -> dict[str, Status]:
        return {job.name: job.status for job in self.store.jobs()}


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    made = World(tmp_path, MemoryRegistry(tmp_path / "registry"))
    yield made
    made.store.close()


def tick_until(world: World, controller: Controller, done: Callable[[], bool], most: int = 1000) -> None:
    for _ in range(most):
        if done():
            return
        controller.tick()
        world.now += 1.0
    raise AssertionError(world.words())


def fused(**changes: Any) -> dict[str, Any]:
    return {"release": {"out": "released"}, **changes}


def test_pipeline_shows_how_far_a_task_is_while_it_runs_and_no_longer(world):
    world.faults.task_polls = 4
    world.submit(finance(), support(), **fused())
    service = HomeService(
        Home(world.folder / "home"), lambda: world.store, lambda: nullcontext(world.registry)
    )
    watched, shown = RunProgress(world.store, world.store.newest_run().id), []

    def look():
        told = list(read_progress(world.store).values())
        assert [view["progress"] for view in service.jobs(everything=True) if view["progress"]] == told
        for progress in told:
            assert watched.look()[-1].steps == f"{progress['step']} {progress['done']}/4"
            shown.append((progress["step"], progress["done"]))

    world.run(on_tick=look)
    assert list(dict.fromkeys(shown)) == [(step, n) for step in ("fuse", "release") for n in (1, 2, 3, 4)]
    assert read_progress(world.store) == {}


def test_pipeline_runs_from_training_to_a_release(world):
    world.submit(finance(), support(), **fused())
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    names = {version.name: version.aliases for version in world.registry.versions()}
    assert names == dict.fromkeys((FINANCE, SUPPORT, FUSED), ("candidate", "champion"))
    assert world.registry.version(FUSED, "champion").tags["fusion.parents"] == f"{FINANCE}/1,{SUPPORT}/1"
    assert (world.folder / "released" / "README.md").read_text().startswith("---")


@pytest.mark.parametrize(("half", "hosts"), [(None, 1), (32, 1), (31, 2)])
def test_job_that_comes_to_a_crowded_host_opens_a_second_one_while_ranks_are_free(world, half, hosts):
    world.faults.half_speed_tokens = half
    controller = world.controller(cpus=4.0)
    world.submit(finance())
    tick_until(world, controller, lambda: world.job("finance").step >= 1)
    world.submit(support())
    tick_until(world, controller, lambda: world.job("support").status is Status.RUNNING)
    assert world.job("finance").status is Status.RUNNING
    assert len(world.cluster.hosts) == hosts
    controller.close()


def test_pipeline_trains_both_jobs_on_one_host_and_scores_the_base_once_a_task(world):
    world.submit(finance(), support(), **fused())
    world.run()
    assert len(world.cluster.asked("start_host")) == 1
    bases = [command for command in world.cluster.asked("Evaluate") if command.adapter_dir is None]
    assert len(bases) == 2
    assert world.cluster.hosts == {}


def test_fusion_asks_for_all_its_scores_and_its_controls_at_once(world):
    world.submit(finance(), support(), **fused(controls={"max_samples": 2}))
    asked: list[int] = []
    world.run(on_tick=lambda: asked.append(len(world.cluster.asked("Evaluate"))))
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    # On each of two tasks: the fused adapter on all rows; it, the base, two parents and a random one on some.
    assert max(after - before for before, after in pairwise(asked)) == 2 * (1 + 5)
    folders = [command.adapter_dir for command in world.cluster.asked("Evaluate")[-12:]]
    assert len(set(folders)) == 5


def test_host_lost_with_many_scores_under_way_gives_them_all_later(world):
    world.submit(finance(), support(), **fused(controls={"max_samples": 2}))

    def lose_the_host() -> None:
        if len(world.cluster.asked("Evaluate")) >= 12 and not world.faults.lose_at:
            world.faults.lose_at.add(world.cluster.polls + 1)

    world.run(on_tick=lose_the_host)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert len(world.cluster.asked("start_host")) == 2
    assert len(world.cluster.asked("Evaluate")) == 4 + 2 * 12


def test_pipeline_curves_reach_the_registry_whole(world):
    world.submit(finance())
    world.run()
    stored = {("loss", row.step): row.loss for row in world.store.metrics(world.job("finance").id)}
    (run,) = world.registry.runs.values()
    assert stored == {key: value for key, value in run.points.items() if key[0] == "loss"}
    assert len(stored) == 5
    assert ("eval_loss", 4) in run.points
    assert (run.status, set(run.evaluations)) == ("FINISHED", {"finance-sentiment", "base/finance-sentiment"})


def test_run_submitted_again_does_nothing_and_succeeds(world):
    first = world.submit(finance(), support(), **fused())
    world.run()
    before = world.registry.versions()
    assert world.submit(finance(), support(), **fused()) != first
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}
    assert world.cluster.log == []
    assert world.registry.versions() == before


def test_run_with_another_gate_judges_again_and_trains_nothing(world):
    world.submit(finance())
    world.run()
    world.submit(finance(evaluation={"gates": {"macro_f1": ">= 0.5"}}))
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED
    assert world.cluster.log == []
    assert len(world.registry.versions()) == 1


def test_version_below_its_gate_stays_candidate_and_its_children_do_not_run(world):
    world.submit(finance(evaluation={"gates": {"macro_f1": ">= 0.95"}}), support(), **fused())
    world.run()
    job = world.job("finance")
    assert (job.status, job.reason) == (Status.FAILED, Reason.GATE_FAILED)
    assert "short by 0.05" in job.message
    (run,) = [run for run in world.registry.runs.values() if run.name == "finance"]
    assert run.status == "FINISHED", "its version is there"
    assert world.registry.version(FINANCE, "candidate").aliases == ("candidate",)
    assert world.registry.version(FINANCE, "1").tags["gate.status"] == "failed"
    assert (world.job("fused").reason, world.job("fused").message) == (Reason.PARENT_FAILED, job.id)
    assert world.job("support").status is Status.SUCCEEDED


def test_version_not_to_be_promoted_stays_candidate_and_succeeds(world):
    world.submit(finance(registry={"promote": False}))
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED
    assert world.registry.version(FINANCE, "1").aliases == ("candidate",)


def test_second_version_worse_than_the_champion_is_kept_back_by_its_margin(world):
    with pytest.MonkeyPatch.context() as patch:
        better = {**METRICS["classification"], "macro_f1": 0.99}
        patch.setitem(METRICS, "classification", better)
        world.submit(finance())
        world.run()
    world.submit(finance(seed=7, evaluation={"champion_margin": {"macro_f1": 0.01}}))
    world.run()
    assert world.job("finance").reason is Reason.GATE_FAILED
    assert world.registry.version(FINANCE, "champion").version == 1


@pytest.mark.parametrize("code", ["diverged", "bad_data", "out_of_memory", "internal_error"])
def test_job_stopped_by_its_host_fails_with_that_reason_and_leaves_its_neighbour_alone(world, code):
    world.faults.stops["finance", 3] = code
    world.submit(finance(), support())
    world.run()
    assert world.job("finance").reason is Reason(code)
    assert world.job("support").status is Status.SUCCEEDED
    assert {run.name: run.status for run in world.registry.runs.values()} == {
        "finance": "FAILED",
        "support": "FINISHED",
    }


def test_job_that_finds_its_disk_full_waits_and_goes_on_from_its_checkpoint(world):
    world.faults.stops["finance", 4] = "disk_full"
    world.submit(finance(max_steps=9), support())
    said = set()

    def look() -> None:
        said.add(world.job("finance").message)
        if world.now > 1040:
            world.faults.stops.clear()

    world.run(on_tick=look)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    words = [message for message in said if message.startswith("after step 3")]
    assert words
    assert all(f"{world.folder}/home/checkpoints/" in each for each in words)
    assert all(each.endswith(" MB free") for each in words)
    job = world.job("finance")
    assert [row.step for row in world.store.metrics(job.id)] == list(range(1, 10))
    assert all(command.job.attempt <= job.attempt for command in world.cluster.asked("Attach"))
    times = [event.at for event in world.store.events(job.id) if event.reason is Reason.DISK_FULL]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert 3 <= len(times) <= 6
    assert pauses == sorted(pauses), "ever more rarely"
    assert pauses[-1] >= 2 * pauses[0]


def test_job_whose_object_store_is_away_waits_ever_longer_and_goes_on_from_its_checkpoint(world):
    world.faults.stops["finance", 4] = "checkpoints_away"
    world.submit(finance(max_steps=9), support())
    said = set()

    def look() -> None:
        said.add((world.job("finance").reason, world.job("finance").message))
        if world.now > 1040:
            world.faults.stops.clear()

    world.run(on_tick=look)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert (Reason.CHECKPOINTS_AWAY, "after step 3: it cannot go on") in said
    job = world.job("finance")
    assert [row.step for row in world.store.metrics(job.id)] == list(range(1, 10))
    times = [event.at for event in world.store.events(job.id) if event.reason is Reason.CHECKPOINTS_AWAY]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert 3 <= len(times) <= 6
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 2 * pauses[0]


def test_job_that_used_its_retries_fails_in_words_also_across_a_restart(world, monkeypatch):
    monkeypatch.setitem(REASONS, Reason.DISK_FULL, replace(REASONS[Reason.DISK_FULL], retries=2))
    world.faults.stops["finance", 3] = "disk_full"
    world.submit(finance(), support())

    def interrupt() -> None:
        if world.job("finance").reason is Reason.DISK_FULL:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(on_tick=interrupt)
    world.run()
    job = world.job("finance")
    assert (job.status, job.reason, job.attempt) == (Status.FAILED, Reason.OUT_OF_RETRIES, 3)
    assert job.message.startswith("2 times: the disk is full; ")
    assert "after step 2" in job.message
    assert world.job("support").status is Status.SUCCEEDED


def test_lost_host_lets_its_jobs_go_on_from_their_checkpoints(world):
    world.faults.lose_at = {7}
    world.submit(finance(max_steps=9), support(max_steps=9))
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}
    assert world.job("finance").attempt == 2
    rows = world.store.metrics(world.job("finance").id)
    assert [row.step for row in rows] == list(range(1, 10))
    assert {row.attempt for row in rows} == {1, 2}


def test_hosts_that_keep_dying_before_they_get_anywhere_fail_the_job(world):
    world.faults.lose_at = set(range(1, 100))
    world.submit(finance())
    world.run()
    job = world.job("finance")
    assert (job.reason, job.attempt) == (Reason.INTERNAL_ERROR, 3)
    assert "rank 1 died" in job.message


def test_evaluation_that_fails_fails_its_job_with_the_words_of_the_host(world):
    world.faults.evaluation_error = "test.jsonl:3 has no label"
    world.submit(finance())
    world.run()
    assert "test.jsonl:3" in world.job("finance").message


def test_score_that_is_not_a_number_fails_its_gate_in_words(world, monkeypatch):
    monkeypatch.setitem(METRICS, "classification", {"macro_f1": math.nan})
    world.submit(finance(evaluation={"gates": {"macro_f1": ">= 0.5"}}))
    world.run()
    assert world.job("finance").reason is Reason.GATE_FAILED
    assert "is not a number" in world.job("finance").message


def test_cancelled_job_leaves_its_slot_and_its_neighbour_finishes(world):
    world.submit(finance(max_steps=50), support())

    def cancel() -> None:
        if world.job("finance").step == 3:
            world.store.request(world.job("finance").id, "cancel", who="ann")

    world.run(on_tick=cancel)
    job = world.job("finance")
    assert (job.status, world.store.events(job.id)[-1].who) == (Status.CANCELLED, "ann")
    assert [command.job for command in world.cluster.asked("Detach")] == [job.id]
    assert world.job("support").status is Status.SUCCEEDED
    assert world.store.open_requests() == ()


def elsewhere(world: World) -> HomeService:
    """Commands with this store, but a home of their own: given in another folder, or on another machine."""
    return HomeService(Home(world.folder / "other", store="x"), lambda: world.store, nullcontext, "ann")


@pytest.mark.parametrize("kind", ["cancel", "pause"])
def test_change_from_another_home_is_asked_of_the_controller_that_lives(world, kind):
    job = f"{world.submit(finance(max_steps=50), support())}.finance"
    service = elsewhere(world)
    done: list[bool] = []

    def change() -> None:
        if world.job("finance").step == 3 and not done:
            assert service.at_work()
            done.append(service.change(job, kind)["done"])
        if kind == "pause" and world.job("support").status.finished and not world.store.open_requests():
            service.change(job, "cancel")

    world.run(on_tick=change)
    assert done == [False]
    assert [command.job for command in world.cluster.asked("Detach")] == [job]
    assert world.statuses() == {"finance": Status.CANCELLED, "support": Status.SUCCEEDED}
    assert not service.at_work(), "it has said that it ends"


@pytest.mark.parametrize("kind", ["cancel", "pause"])
def test_job_that_others_end_or_pause_in_the_store_leaves_its_slot(world, monkeypatch, kind):
    """A controller that has not shown itself for long, as its machine stood still, is taken for dead."""
    monkeypatch.setattr("orchestrator.control.show.ALIVE_SECONDS", -1.0)
    job = f"{world.submit(finance(max_steps=50), support())}.finance"
    service = elsewhere(world)
    controller = world.controller()
    controller.recover()
    tick_until(world, controller, lambda: world.job("finance").step == 3)
    assert service.change(job, kind)["done"]
    tick_until(world, controller, lambda: world.job("support").status.finished)
    assert [command.job for command in world.cluster.asked("Detach")] == [job]
    assert world.job("finance").step <= 5
    assert not any(host.residents for host in controller._work.fleet.hosts)
    if kind == "cancel":
        (run,) = [run for run in world.registry.runs.values() if run.name == "finance"]
        assert run.status == "KILLED"


def test_job_cancelled_in_the_store_before_its_host_is_ready_gives_its_slot_back(world, monkeypatch):
    monkeypatch.setattr("orchestrator.control.show.ALIVE_SECONDS", -1.0)
    world.submit(finance(max_steps=50))
    controller = world.controller()
    controller.recover()
    tick_until(world, controller, lambda: world.job("finance").status is Status.STARTING)
    assert elsewhere(world).change("finance", "cancel")["done"]
    tick_until(world, controller, lambda: not controller.tick(), 3)
    assert world.cluster.asked("Attach") == []


def test_job_that_outlasts_its_max_duration_is_stopped_and_its_neighbour_finishes(world):
    world.submit(finance(max_steps=500, schedule={"max_duration": "10s"}), support())
    world.run()
    job = world.job("finance")
    assert job.reason is Reason.OUT_OF_TIME
    assert 10 < job.finished_at - job.started_at <= 12
    assert world.job("support").status is Status.SUCCEEDED


def test_max_duration_counts_neither_pauses_nor_the_time_without_a_controller(world):
    world.submit(finance(max_steps=20, schedule={"max_duration": "60s"}))
    asked: list[str] = []

    def pause_for_long() -> None:
        job = world.job("finance")
        if job.step == 5 and not asked:
            asked.append("pause")
            world.store.request(job.id, "pause")
        if job.reason is Reason.PAUSED_BY_USER:
            asked.append("resume")
            world.now += 1000.0
            world.store.request(job.id, "resume")
        if job.step == 12:
            raise Killed  # no event tells when

    killed = world.controller()
    killed.recover()
    with pytest.raises(Killed):
        tick_until(world, killed, lambda: bool(pause_for_long()))
    world.now += 1000.0
    world.run()
    assert asked == ["pause", "resume"]
    assert world.job("finance").status is Status.SUCCEEDED, world.words()


def test_max_duration_is_of_all_stretches_together(world):
    world.submit(finance(max_steps=500, schedule={"max_duration": "20s"}))

    def interrupt() -> None:
        if world.job("finance").step == 12 and world.job("finance").attempt == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(on_tick=interrupt)
    world.now += 1000.0
    resumed = world.now
    world.run()
    assert world.job("finance").reason is Reason.OUT_OF_TIME
    assert world.job("finance").finished_at - resumed < 12


def test_paused_job_leaves_its_slot_and_goes_on_from_what_it_saved_when_resumed(world):
    world.submit(finance(max_steps=12), support(max_steps=30))
    paused_at: list[int] = []

    def pause_then_resume() -> None:
        job, other = world.job("finance"), world.job("support")
        if job.step == 5 and not paused_at:
            paused_at.append(other.step)
            world.store.request(job.id, "pause", who="ann")
        if paused_at and other.step == 20 and job.reason is Reason.PAUSED_BY_USER:
            assert (job.status, job.host) == (Status.WAITING, None)
            world.store.request(job.id, "resume", who="ben")

    world.run(on_tick=pause_then_resume)
    events = [(event.reason, event.who) for event in world.store.events(world.job("finance").id)]
    assert (Reason.PAUSED_BY_USER, "ann") in events
    assert (Reason.RESUMED_BY_USER, "ben") in events
    assert [command.job for command in world.cluster.asked("Detach")] == [world.job("finance").id]
    assert world.job("finance").attempt == 2
    assert set(world.statuses().values()) == {Status.SUCCEEDED}


def test_paused_job_whose_host_is_lost_stays_paused(world):
    world.faults.lose_at = {9}
    world.submit(finance(max_steps=20), support(max_steps=20))

    asked: list[str] = []

    def pause() -> None:
        job = world.job("finance")
        if job.step == 3 and not asked:
            asked.append("pause")
            world.store.request(job.id, "pause")
        if world.job("support").status is Status.SUCCEEDED and asked == ["pause"]:
            assert job.reason is Reason.PAUSED_BY_USER
            asked.append("resume")
            world.store.request(job.id, "resume")

    world.run(on_tick=pause)
    assert len(world.cluster.asked("start_host")) > 1
    assert set(world.statuses().values()) == {Status.SUCCEEDED}


def test_priority_asked_for_a_waiting_job_sends_it_first(world):
    write_yaml(world.folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 2, "slots": 1})
    world.submit(finance(), support())
    world.store.request(world.job("support").id, "priority", who="ann", value=90)
    world.run()
    assert [command.job.job for command in world.cluster.asked("Attach")] == [
        world.job("support").id,
        world.job("finance").id,
    ]


def test_controller_works_on_every_run_and_takes_in_what_is_submitted_meanwhile(world):
    world.submit(finance(max_steps=8))
    submitted: list[str] = []

    def submit() -> None:
        if world.job("finance").step == 4 and not submitted:
            submitted.append(world.submit(support(max_steps=4)))

    world.run(on_tick=submit)
    assert {run.status for run in world.store.runs()} == {Status.SUCCEEDED}
    assert len(world.cluster.asked("start_host")) == 1


def test_controller_until_a_run_has_ended_lets_other_jobs_save_what_they_have(world):
    first = world.submit(finance(max_steps=6))
    world.submit(support(max_steps=50))
    world.controller().run(until=first, wait=lambda _: setattr(world, "now", world.now + 1))
    assert world.store.run(first).status is Status.SUCCEEDED
    other = world.job("support")
    assert (other.status, other.reason, world.cluster.hosts) == (Status.WAITING, Reason.INTERRUPTED, {})
    assert [command.job for command in world.cluster.asked("Detach")] == [other.id]
    world.run()
    assert world.job("support").status is Status.SUCCEEDED


def test_step_that_was_forgotten_is_done_again_by_a_controller_that_knew_it_done(world):
    """A release folder that was removed: `submit` forgets its step while the controller is at work."""
    world.submit(finance(), support(max_steps=40))
    again: list[str] = []

    def forget() -> None:
        if world.job("finance").status is Status.SUCCEEDED and not again:
            promote = next(row for row in world.store.steps.read().values() if row.kind == "promote")
            world.store.steps.forget(promote.id)
            again.append(world.submit(finance()))

    world.run(on_tick=forget)
    promotions = [row for row in world.store.steps.read().values() if row.kind == "promote"]
    assert {row.job for row in promotions} == {f"{again[0]}.finance", world.job("support").id}


def test_report_of_a_stale_attempt_that_slips_through_changes_no_status(world):
    """Two controllers for a moment: the store itself refuses what the memory of one would let through."""
    world.submit(finance(max_steps=9))
    controller = world.controller()
    controller.recover()
    while world.job("finance").step < 3:
        controller.tick()
        world.now += 1.0
    job = world.job("finance").id
    for reason in (Reason.HOST_LOST, Reason.PLACED):
        world.store.switch_status(job, reason, who="another")
    stale = controller._work.switch(job, Reason.DIVERGED, "late", attempt=1)
    assert (stale.status, stale.attempt) == (Status.STARTING, 2)
    assert world.job("finance").status is Status.STARTING


def test_card_names_data_without_the_folders_of_this_machine(world):
    world.submit(finance(), support(), **fused())
    world.run()
    for version in world.registry.versions():
        card = world.registry.read_text(version, "README.md")
        assert "data/finance" in card or "data/support" in card
        assert str(world.folder) not in card


def test_run_that_is_interrupted_leaves_its_jobs_waiting_and_can_go_on(world):
    world.submit(finance(max_steps=20), support())

    def interrupt() -> None:
        if world.job("finance").step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(on_tick=interrupt)
    job = world.job("finance")
    assert (job.status, job.reason) == (Status.WAITING, Reason.INTERRUPTED)
    assert world.cluster.hosts == {}
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}


def test_waiting_job_that_is_cancelled_never_starts(world):
    world.submit(finance())
    world.store.request(world.job("finance").id, "cancel")
    world.run()
    assert world.job("finance").status is Status.CANCELLED
    assert world.cluster.log == []


def test_jobs_share_a_single_slot_one_after_the_other(world):
    write_yaml(world.folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 2, "slots": 1})
    world.submit(finance(), support())
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}
    reasons = [event.reason for event in world.store.events(world.job("support").id)]
    assert Reason.WAITS_FOR_SLOT in reasons


def parameters(world, name: str) -> int:
    plan = make_plan(load_pipeline(world.folder / "pipeline.yaml"))
    estimate = next(job.estimate for job in plan.jobs if job.name == name)
    assert estimate is not None
    return estimate.adapter_parameters


def test_jobs_that_do_not_fit_together_train_one_after_the_other(world):
    world.submit(finance(), support())
    world.faults.adapter_room = max(parameters(world, "finance"), parameters(world, "support"))
    reasons: set[Reason] = set()
    world.run(on_tick=lambda: reasons.update(job.reason for job in world.store.jobs()))
    assert set(world.statuses().values()) == {Status.SUCCEEDED}
    assert Reason.WAITS_FOR_MEMORY in reasons


def test_job_that_a_host_finds_no_memory_for_is_tried_again_ever_more_rarely(world):
    world.submit(finance(max_steps=40), support(max_steps=40))
    world.faults.alone = True
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}
    tried = Counter(command.job.job.rpartition(".")[2] for command in world.cluster.asked("Attach"))
    assert sorted(tried)[:2] == ["finance", "support"]
    # After 1, 2, 4, 8 ... seconds, each a step of the other's.
    assert 3 <= max(tried["finance"], tried["support"]) <= 7


def test_job_larger_than_the_memory_of_its_host_fails_in_words(world):
    world.submit(finance(), support(lora_r=64))
    world.faults.adapter_room = parameters(world, "finance")
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED
    failed = world.job("support")
    assert failed.reason is Reason.OUT_OF_MEMORY
    assert f"no room for {parameters(world, 'support'):,} adapter parameters" in failed.message


def test_job_with_more_ranks_than_the_cluster_fails_after_some_patience(world):
    world.submit(finance(resources={"world_size": 4}), support())
    world.run()
    job = world.job("finance")
    assert (job.reason, job.message) == (Reason.TOO_LARGE, "it needs 4 ranks")
    assert job.finished_at - job.submitted_at >= 30
    assert world.job("support").status is Status.SUCCEEDED


def test_host_that_the_cluster_refuses_fails_its_jobs_in_its_words(world):
    world.faults.refuse_hosts = BadInput("world_size is 2, but without Ray a host is one process")
    world.submit(finance())
    world.run()
    assert "without Ray" in world.job("finance").message


def test_fusion_that_is_refused_fails_with_the_words_of_the_task(world):
    world.faults.task_result = TaskResult(error="the adapters have no module in common", refused=True)
    world.submit(finance(), support(), **fused())
    world.run()
    job = world.job("fused")
    assert (job.reason, job.message) == (Reason.FUSION_REFUSED, "the adapters have no module in common")


def test_task_on_a_full_disk_waits_and_is_done_again(world):
    world.faults.task_result = TaskResult.of(OSError(errno.ENOSPC, "No space left on device"))
    world.submit(finance(), support(), **fused())
    seen: set[tuple[Reason, str]] = set()

    def look() -> None:
        seen.add((world.job("fused").reason, world.job("fused").message))
        if world.now > 1040:
            world.faults.task_result = None

    world.run(on_tick=look)
    assert world.job("fused").status is Status.SUCCEEDED, world.words()
    words = [message for reason, message in seen if reason is Reason.DISK_FULL]
    assert words
    assert all("No space left" in each for each in words)
    assert all(f"{world.folder}/home/fusions/" in each for each in words)


class AwayRegistry:
    """Answers nothing while `away`; `broken` raises instead of registering."""

    def __init__(self, inner: MemoryRegistry) -> None:
        self.inner = inner
        self.away = False
        self.broken: Exception | None = None
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        if self.away:
            self.refused += 1
            raise RegistryUnreachable("the registry does not answer")
        if self.broken and name == "register":
            raise self.broken
        return getattr(self.inner, name)


def test_registry_away_lets_training_go_on_and_nothing_is_lost(world):
    world.registry = AwayRegistry(world.registry)
    world.registry.away = True
    world.submit(finance(), support(), **fused())
    seen: set[Reason] = set()

    def look() -> None:
        seen.update(job.reason for job in world.store.jobs())
        world.registry.away = world.now < 1200

    world.run(on_tick=look)
    assert Reason.REGISTRY_AWAY in seen
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert world.registry.refused < 30, "a registry that is away is tried again ever more rarely"
    losses = {
        run.name: sum(key == "loss" for key, _ in run.points) for run in world.registry.inner.runs.values()
    }
    assert losses == {"finance": 5, "support": 5, "fused": 0}


def test_full_disk_while_registering_waits_and_registers_once(world):
    world.registry = AwayRegistry(world.registry)
    world.registry.broken = OSError(errno.ENOSPC, "No space left on device")
    world.submit(finance())
    seen: set[Reason] = set()

    def look() -> None:
        seen.add(world.job("finance").reason)
        if world.now > 1040:
            world.registry.broken = None

    world.run(on_tick=look)
    assert Reason.DISK_FULL in seen
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert len(world.registry.versions()) == 1


def test_job_that_ended_while_the_registry_was_away_has_its_run_ended_by_the_next_controller(world):
    world.registry = AwayRegistry(world.registry)
    world.submit(finance(max_steps=40))

    def cancel() -> None:
        world.registry.away |= world.job("finance").step == 8
        if world.job("finance").step == 12:
            world.store.request(world.job("finance").id, "cancel")

    world.run(on_tick=cancel)
    (run,) = world.registry.inner.runs.values()
    assert (run.status, world.store.curves.pending()) == ("RUNNING", {world.job("finance").series})
    world.registry.away = False
    world.submit(support())
    world.run()
    last = world.store.metrics(world.store.jobs()[0].id)[-1].step
    assert (run.status, ("loss", last) in run.points) == ("KILLED", True)
    assert not world.store.curves.pending()


def test_controller_keeps_nothing_of_jobs_that_have_ended(world):
    controller = world.controller()
    controller.recover()
    work = controller._work

    def held() -> list[int]:
        kept = (work._orders, work._runs, work.ledger._results, controller._curves._runs, world.cluster.tasks)
        return [len(each) for each in kept]

    counts: list[list[int]] = []
    for seed in range(4):
        run = world.submit(finance(seed=seed), support(seed=seed), **fused(release=None))
        tick_until(world, controller, lambda run=run: world.store.run(run).status.finished)
        for _ in range(3):
            controller.tick()
            world.now += 1.0
        counts.append(held())
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert counts[1:] == counts[:-1]
    assert sum(counts[0]) == 0


def test_error_of_ours_in_one_job_leaves_the_others_alone(world):
    world.registry = AwayRegistry(world.registry)
    world.registry.broken = RuntimeError("a bug")
    world.submit(finance(evaluation={"gates": {"macro_f1": ">= 0.1"}}))
    world.run()
    assert (world.job("finance").reason, world.job("finance").message) == (
        Reason.INTERNAL_ERROR,
        "RuntimeError: a bug",
    )


def test_adapter_folder_altered_while_nobody_ran_is_trained_again(world):
    world.submit(finance())
    controller = world.controller()
    adapters = world.folder.glob("home/checkpoints/*/adapter/adapter_config.json")
    while not (written := list(adapters)):
        controller.tick()
        adapters = world.folder.glob("home/checkpoints/*/adapter/adapter_config.json")
    written[0].write_text("altered")
    world.run()
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert len(world.cluster.asked("Attach")) == 1
    (version,) = world.registry.versions()
    assert (world.registry.store / version.model_id / "adapter_config.json").read_text() != "altered"


def test_equal_training_of_two_runs_is_done_once(world):
    world.submit(finance())
    world.submit(finance(name="again", evaluation={"gates": {"macro_f1": ">= 0.5"}}))
    world.run()
    assert world.statuses() == {"finance": Status.SUCCEEDED, "again": Status.SUCCEEDED}
    assert len(world.cluster.asked("Attach")) == 1
    assert len(world.registry.versions()) == 1


def test_equal_training_is_taken_over_when_the_job_that_did_it_is_cancelled(world):
    world.submit(finance(max_steps=20))
    world.now += 1.0  # the older one goes first; between equals their ids would decide
    world.submit(finance(max_steps=20, name="again", evaluation={"gates": {"macro_f1": ">= 0.5"}}))

    def cancel() -> None:
        if world.job("finance").step == 4:
            world.store.request(world.job("finance").id, "cancel")

    world.run(on_tick=cancel)
    assert world.statuses() == {"finance": Status.CANCELLED, "again": Status.SUCCEEDED}
    assert [command.job.job for command in world.cluster.asked("Attach")] == [
        world.job("finance").id,
        world.job("again").id,
    ]


def test_controller_of_one_run_leaves_other_runs_waiting(world):
    mine = world.submit(finance())
    world.submit(support())
    world.run(mine)
    assert world.statuses() == {"finance": Status.SUCCEEDED, "support": Status.WAITING}


def test_registered_adapter_is_fused_by_the_digest_it_was_planned_with(world):
    world.submit_beside_registered("champion", **fused())
    world.run()
    assert world.job("fused").status is Status.SUCCEEDED, world.words()
    assert world.registry.version(FUSED, "1").tags["fusion.parents"] == f"{FINANCE}/1,{SUPPORT}/1"


def test_registered_adapter_that_moved_since_it_was_planned_is_refused(world):
    world.submit_beside_registered("champion", digest="0" * 64, **fused())
    world.run()
    assert world.job("fused").status is Status.FAILED
    assert "submit again" in world.job("fused").message


def test_job_whose_stored_plan_cannot_be_read_fails_alone(world):
    run = new_run(make_plan(load_pipeline(write_yaml(world.folder / "p.yaml", pipeline(finance())))))
    broken = replace(run.jobs[0], plan={"job": {}, "experiment": "x", "adapters": {}}, name="broken")
    world.store.submit(replace(run, key="9" * 64, jobs=(broken, *run.jobs)))
    world.run()
    assert world.statuses() == {"broken": Status.FAILED, "finance": Status.SUCCEEDED}


def test_controller_decides_anew_when_something_changed_or_a_second_went_by(world, monkeypatch):
    from orchestrator.control import controller as loop

    decided = []
    monkeypatch.setattr(loop, "schedule", lambda snapshot: decided.append(snapshot) or schedule(snapshot))
    world.submit(finance(max_steps=200))
    controller = world.controller()
    controller.recover()
    while world.job("finance").step < 5:
        controller.tick()
    before, step = len(decided), world.job("finance").step
    for _ in range(20):
        controller.tick()
    assert world.job("finance").step == step + 20, "what hosts report is taken in all the same"
    assert len(decided) == before
    world.now += loop.DECIDE_SECONDS
    controller.tick()
    controller.tick()
    assert len(decided) == before + 1
    world.submit(support())
    controller.tick()
    assert len(decided) == before + 2


def test_controller_looks_less_often_while_hosts_only_step_and_at_once_after_anything_else(world):
    world.submit(finance(max_steps=40))
    pauses: dict[int, float] = {}
    asked: list[str] = []

    def wait(seconds: float) -> None:
        pauses[world.job("finance").step] = seconds
        world.now += 0.6
        if world.job("finance").step == 20 and not asked:
            asked.append(world.submit(support()))

    world.controller().run(wait=wait)
    assert pauses[1] == pauses[2] == pace.TICK_SECONDS, "it was just placed"
    assert pauses[10] == pauses[20] == pace.CALM_SECONDS
    assert pauses[21] == pace.TICK_SECONDS
    assert pauses[40] == pace.TICK_SECONDS, "it is scored"


def test_controller_rests_longer_the_more_jobs_step_but_not_from_who_wants_something():
    resting = pace.Pace(lambda: 100.0)
    pauses = [resting.pause(residents, awaited=False) for residents in (1, 10, 50, 1000)]
    assert pauses == [pace.CALM_SECONDS, pace.CALM_SECONDS, 50 * pace.FOR_A_RESIDENT, pace.LONGEST_CALM]
    waited: list[float] = []
    resting.rest(2.3, waited.append, wanted=lambda: False)
    assert sum(waited) == pytest.approx(2.3)
    resting.rest(2.3, waited.append, wanted=lambda: True)
    assert waited[-1] == pace.LOOK_SECONDS
    resting.changed()
    assert resting.pause(1000, awaited=False) == pace.TICK_SECONDS


def test_curves_of_many_jobs_go_to_the_registry_more_rarely(world, monkeypatch):
    from orchestrator.control import curve_export

    monkeypatch.setattr(curve_export, "JOBS_A_SECOND", 0.1)
    logged = []

    class Counting(MemoryRegistry):
        def log_metrics(self, run, points):
            logged.append(world.now)
            super().log_metrics(run, points)

    world.registry = Counting(world.folder / "counting")
    world.submit(finance(max_steps=100))
    world.run()
    whole = [p for run in world.registry.runs.values() for p in run.points if p[0] == "loss"]
    assert sorted(step for _, step in whole) == list(range(1, 101))
    assert max(later - earlier for earlier, later in pairwise(sorted(set(logged)))) >= 10
