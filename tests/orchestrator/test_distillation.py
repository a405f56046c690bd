"""Rule distill and the controls: from a pipeline file to a version and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.job import Status
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan, PlannedJob, RegisterWhat, TrainWhat
from orchestrator.recipe.pipeline import load_pipeline
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.recipe_files import finance, fuse, pipeline, support, write_world, write_yaml
from tests.orchestrator.test_controller import FUSED, World

DISTILL = {"max_steps": 4, "learning_rate": 1e-3, "temperature": 2.0, "labels": 0.25}
TASKS = ("finance-sentiment", "support")


def distilled(**changes: Any) -> dict[str, Any]:
    return fuse(**{"rule": "distill", "rank": 8, "distill": DISTILL, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_world(tmp_path)


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    made = World(folder, MemoryRegistry(folder / "registry"))
    yield made
    made.store.close()


def plan(folder: Path, **changes: Any) -> Plan:
    return make_plan(
        load_pipeline(
            write_yaml(folder / "demo.yaml", pipeline(finance(), support(), fuse=distilled(**changes)))
        )
    )


def student(planned: Plan) -> TrainWhat:
    what = planned.jobs[-1].step("train").what
    assert isinstance(what, TrainWhat)
    return what


def test_distillation_trains_on_a_host_from_the_parents_sum(folder: Path) -> None:
    planned = plan(folder)
    money, help_, fusion = planned.jobs
    kinds = [step.kind for step in fusion.steps]
    assert kinds == ["fuse", "train", "evaluate", "evaluate", "register", "promote"]
    start, train = fusion.steps[:2]
    parents = (money.step("train").id, help_.step("train").id)
    assert set(train.needs) == {start.id, *parents}
    what = student(planned)
    assert (what.teachers, what.start) == (parents, start.id)
    spec = what.attempt("job", 2, "/c", lambda adapter: f"/of/{adapter[:4]}")
    assert spec.distill is not None
    assert [t.adapter_dir for t in spec.distill.teachers] == [f"/of/{parent[:4]}" for parent in parents]
    assert (spec.distill.start, spec.distill.labels, spec.adapter.r) == (f"/of/{start.id[:4]}", 0.25, 8)
    assert [t.batch_size for t in spec.distill.teachers] == [32, 32]
    assert spec.training.global_batch_size == 64


def test_distillation_is_stored_and_read_back(folder: Path) -> None:
    fusion = plan(folder).jobs[-1]
    assert PlannedJob.from_json(fusion.to_json()) == fusion


def test_distillation_asks_for_memory_for_the_student_and_its_teachers(folder: Path) -> None:
    money, help_, fusion = plan(folder).jobs
    assert money.estimate
    assert help_.estimate
    assert fusion.estimate
    both = money.estimate.adapter_parameters + help_.estimate.adapter_parameters
    assert fusion.estimate.adapter_parameters == both + money.estimate.adapter_parameters // 2


@pytest.mark.parametrize(
    "changes",
    [
        {"distill": {**DISTILL, "temperature": 1.0}},
        {"distill": {**DISTILL, "labels": 0.0}},
        {"distill": {**DISTILL, "start": "fresh"}},
        {"distill": {**DISTILL, "seed": 1}},
        {"rank": 4},
        {"adapters": [{"job": "finance", "share": 2.0}, {"job": "support"}]},
        {"adapters": [{"job": "finance", "rows": 3}, {"job": "support"}]},
        {"adapters": [{"job": "finance", "weight": 0.5}, {"job": "support"}]},
    ],
)
def test_distillation_is_another_training_when_what_bears_on_it_changes(
    folder: Path, changes: dict[str, Any]
) -> None:
    assert plan(folder, **changes).jobs[-1].step("train").id != plan(folder).jobs[-1].step("train").id


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"distill": {**DISTILL, "saves_per_epoch": 5, "evals_per_epoch": 0}}]
)
def test_distillation_is_the_same_training_whatever_its_name_and_pace(
    folder: Path, changes: dict[str, Any]
) -> None:
    assert plan(folder, **changes).jobs[-1].step("train").id == plan(folder).jobs[-1].step("train").id


def test_distillation_runs_to_a_version_with_its_parents(world: World) -> None:
    world.submit(finance(), support(), **distilled())
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    version = world.registry.version(FUSED, "champion")
    assert version.tags["fusion.parents"] == "tiny.finance-sentiment/1,tiny.support/1"
    taught = [command.job for command in world.cluster.asked("Attach") if command.job.distill]
    assert len(taught) == 1
    (run,) = [run for run in world.registry.runs.values() if run.params.get("rule") == "distill"]
    assert (run.params["temperature"], run.params["r"]) == ("2.0", "8")
    assert [key for key in run.points if key[0] == "loss"] == [("loss", step) for step in range(1, 5)]


def test_distillation_goes_on_after_its_host_is_lost(world: World) -> None:
    world.faults.lose_at = {14}
    world.submit(finance(), support(), **distilled())
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert world.job("fused").attempt + world.job("finance").attempt + world.job("support").attempt > 3


def test_controls_are_the_base_the_parents_and_noise_on_the_same_rows(folder: Path) -> None:
    fusion = plan(folder, controls={"max_samples": 2}).jobs[-1]
    what = fusion.step("register").what
    assert isinstance(what, RegisterWhat)
    assert list(what.controls) == ["base", "parent finance", "parent support", "fused", "random"]
    steps = {step.id: step for step in fusion.steps}
    for of_task in what.controls.values():
        assert tuple(of_task) == TASKS
        for step in of_task.values():
            evaluation = steps[step].what.evaluation  # type: ignore[union-attr]
            assert evaluation.generate_samples == 0
            assert {dataset.max_samples for dataset in evaluation.datasets} == {2}
    assert set(fusion.step("register").needs) >= {s for of in what.controls.values() for s in of.values()}


def test_controls_on_all_rows_score_nothing_twice(folder: Path) -> None:
    money, _, fusion = plan(folder, controls={"max_samples": None}).jobs
    what = fusion.step("register").what
    assert isinstance(what, RegisterWhat)
    assert what.controls["fused"] == what.scores
    assert what.controls["base"] == what.base_scores
    assert what.controls["parent finance"]["finance-sentiment"] == money.step("evaluate").id
    assert len({step.id for step in fusion.steps}) == len(fusion.steps)


def test_controls_with_joint_training_train_on_the_labels_alone(world: World) -> None:
    world.submit(finance(), support(), **distilled(controls={"joint": True}))
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    joint, taught = sorted(
        (command.job.distill for command in world.cluster.asked("Attach") if command.job.distill),
        key=lambda distill: -distill.labels,
    )
    assert (joint.labels, joint.start, {t.adapter_dir for t in joint.teachers}) == (1.0, "", {""})
    assert taught.labels == 0.25
    # Its curve is its own: the student's has as many points as it has steps.
    (run,) = [run for run in world.registry.runs.values() if run.params.get("rule") == "distill"]
    assert len([key for key in run.points if key[0] == "loss"]) == 4


def test_controls_are_in_the_fusion_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    register = world.registry.register
    monkeypatch.setattr(world.registry, "register", lambda new: (registered.append(new), register(new))[1])
    world.submit(finance(), support(), **fuse(rule="cat", controls={}))
    world.run()
    report = registered[-1].fusion_report
    assert report["rule"] == "cat"
    assert set(report["controls"]["scores"]) == {
        "base",
        "parent finance",
        "parent support",
        "fused",
        "random",
    }
    assert report["controls"]["best_single"].startswith("parent ")
    assert report["controls"]["scores"]["fused"].keys() >= {"support.perplexity", "support.loss"}
