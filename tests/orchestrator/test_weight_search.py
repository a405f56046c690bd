"""`search` in a pipeline: its step, its refusals, and a run to a version with the table of trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import PlannedJob, SearchWhat
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.registry.fusion_plots import fusion_plots
from tests.orchestrator import fakes
from tests.orchestrator.fakes import FLOORS, search
from tests.orchestrator.recipe_files import finance, fuse, pipeline, support, write_world, write_yaml
from tests.orchestrator.test_controller import FUSED, World, world  # noqa: F401 - a fixture
from workers.types import BadInput

SEARCH = {"trials": 5, "floors": FLOORS, "groups": ["self_attn", "mlp"], "max_samples": 3, "seed": 7}


def planned(folder: Path, money: Any = None, **search: Any) -> PlannedJob:
    block = fuse(rule="svd", rank=4, search={**SEARCH, **search})
    jobs = (finance(**(money or {})), support())
    file = write_yaml(folder / "demo.yaml", pipeline(*jobs, fuse=block))
    return make_plan(load_pipeline(file)).jobs[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_world(tmp_path)


def test_search_takes_the_place_of_the_fusion_and_judges_by_validation_rows(folder: Path) -> None:
    job = planned(folder)
    assert [step.kind for step in job.steps] == ["search", "evaluate", "evaluate", "register", "promote"]
    what = job.steps[0].what
    assert isinstance(what, SearchWhat)
    assert (what.fuse.rule, what.fuse.rank, what.trials, what.groups) == ("svd", 4, 5, ("self_attn", "mlp"))
    assert {task.task: (task.metric, task.lower_is_better, task.floor) for task in what.tasks} == {
        "finance-sentiment": ("macro_f1", False, 0.9),
        "support": ("loss", True, 0.9),
    }
    for task in what.tasks:
        assert {(d.split, d.max_samples) for d in task.evaluation.datasets} == {("validation", 3)}
        assert task.evaluation.generate_samples == 0
    assert PlannedJob.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 6},
        {"seed": 8},
        {"groups": []},
        {"max_samples": 2},
        {"floors": {**FLOORS, "support.loss": 0.5}},
    ],
)
def test_search_is_another_one_when_what_bears_on_it_changes(folder: Path, changes: dict[str, Any]) -> None:
    assert planned(folder, **changes).steps[0].id != planned(folder).steps[0].id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"floors": {"support.loss": 0.9}}, "give the task 'finance-sentiment' one metric and its floor"),
        ({"floors": {**FLOORS, "support.perplexity": 0.9}}, "give the task 'support' one metric"),
        ({"floors": {**FLOORS, "suport.loss": 0.9}}, "did you mean 'support.loss'"),
        ({"floors": {**FLOORS, "support.chrf": 0.9}}, "support.chrf needs replies"),
        (
            {"groups": ["self_attn", "mpl"]},
            "fuse.search.groups: no module that is fused has 'mpl' in its name",
        ),
        ({"groups": ["proj", "mlp"]}, "fuse.search.groups: 'mlp' is left no module by the groups before it"),
        ({"trials": 1}, "fuse.search.trials should be greater than or equal to 2"),
    ],
)
def test_search_that_cannot_be_judged_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as error:
        planned(folder, **changes)
    assert words in str(error.value)


def test_search_without_validation_rows_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="'finance' has no validation rows to search on"):
        planned(folder, money={"evals_per_epoch": 0})


def test_search_with_rule_distill_is_refused(folder: Path) -> None:
    block = fuse(rule="distill", rank=4, distill={"max_steps": 2}, search=SEARCH)
    with pytest.raises(BadInput, match="not for rule distill"):
        load_pipeline(write_yaml(folder / "demo.yaml", pipeline(finance(), support(), fuse=block)))


def test_search_runs_on_a_host_and_its_table_goes_into_the_registry(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[Any] = []
    register = world.registry.register
    monkeypatch.setattr(world.registry, "register", lambda new: (registered.append(new), register(new))[1])
    world.submit(finance(), support(), **fuse(rule="cat", search=SEARCH, controls={}))
    world.run()
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    (command,) = world.cluster.asked("SearchWeights")
    assert command.search.trials_dir == str(world.folder / "home" / "searches" / command.request)
    report = registered[-1].fusion_report
    assert report["search"]["trials"][0]["weights"] == [[1.0, 1.0]]
    assert set(report["controls"]["scores"]) >= {"base", "fused", "random"}
    assert world.registry.version(FUSED, "champion").aliases == ("candidate", "champion")
    (run,) = [run for run in world.registry.runs.values() if run.params.get("trials")]
    assert (run.params["rule"], run.params["weights"], run.params["trials"]) == ("cat", "searched", "5")


def test_search_is_drawn_as_a_picture_of_its_trials(tmp_path: Path) -> None:
    keys = ("a.loss", "b.loss", "c.loss")
    trials = [
        {"retention": dict(zip(keys, (0.1 * n, 1 - 0.1 * n, 0.5), strict=True)), "pareto": n % 2 == 0}
        for n in range(6)
    ]
    table = {"floors": dict.fromkeys(keys, 0.9), "best": 2, "trials": trials}
    fusion_plots({"search": table}, tmp_path)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_search_whose_host_is_lost_is_asked_for_again_with_its_table(world: World) -> None:  # noqa: F811
    world.submit(finance(), support(), **fuse(rule="cat", search=SEARCH))
    world.run(on_tick=lambda: _lose_the_host_of_a_search(world))
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    first, second = world.cluster.asked("SearchWeights")
    assert (first.search.trials_dir, first.request) == (second.search.trials_dir, second.request)
    assert world.job("fused").attempt == 2


def _lose_the_host_of_a_search(world: World) -> None:  # noqa: F811
    """At its next poll, which would have brought the search's end."""
    if not world.faults.lose_at and world.cluster.asked("SearchWeights"):
        world.faults.lose_at = {world.cluster.polls + 1}


def test_search_whose_adapter_does_not_verify_fails_its_job_alone(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def torn(command: Any) -> Any:
        done = search(command)
        (weights,) = Path(command.search.plan.out_dir).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
        return done

    monkeypatch.setattr(fakes, "search", torn)
    world.submit(finance(), support(), **fuse(rule="cat", search=SEARCH))
    world.submit(finance(name="beside", seed=3, max_steps=40))
    world.run()
    assert world.statuses() == {
        **{"finance": Status.SUCCEEDED, "support": Status.SUCCEEDED, "fused": Status.FAILED},
        "beside": Status.SUCCEEDED,
    }
    fused = world.job("fused")
    assert fused.reason is Reason.INTERNAL_ERROR
    assert "does not match the digest" in fused.message


def test_fusion_plots_draw_the_certificate_of_a_fusion(tmp_path: Path) -> None:
    report = {"cosines": [[1.0, -0.2], [-0.2, 1.0]], "spectrum": [3.0, 1.0, 0.0]}
    fusion_plots({**report, "summary": {"effective_rank": 1.8}}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["similarity.png", "spectrum.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
