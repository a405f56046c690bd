"""Steps and their content ids: equal work is recognised, a change redoes what depends on it and no more."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.plan import make_plan, num_steps
from orchestrator.plan.steps import (
    EvaluateWhat,
    FuseWhat,
    Plan,
    PlannedJob,
    PromoteWhat,
    RegisterWhat,
    TrainWhat,
)
from orchestrator.recipe.pipeline import load_pipeline
from tests.orchestrator.recipe_files import (
    finance,
    fuse,
    pipeline,
    support,
    write_json,
    write_world,
    write_yaml,
)
from workers.order import num_steps as host_num_steps
from workers.types import BadInput, TrainingSpec

ALL = {"evaluate_base", "train", "evaluate", "register", "promote"}
AFTER_TRAIN = ALL - {"evaluate_base"}
FUSED = {"fuse", "evaluate", "register", "promote", "release"}
GATES = {"gates": {"support.perplexity": "<= 9"}, "retention": {"finance-sentiment.macro_f1": ">= 0.6"}}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world-a")


def plan(
    world: Path, *, money: Any = None, help_: Any = None, fused: Any = None, digests: Any = None, **rest: Any
) -> Plan:
    """The plan of two jobs and their fusion, each with changes to its recipe."""
    block = fuse(**{"evaluation": GATES, "release": {"out": "out"}, **(fused or {})})
    jobs = (finance(**(money or {})), support(**(help_ or {})))
    file = write_yaml(world / "demo.yaml", pipeline(*jobs, fuse=block, **rest))
    return make_plan(load_pipeline(file), digests)


def redone(before: Plan, after: Plan) -> dict[str, set[str]]:
    """Job -> kinds of the steps of `after` that `before` has not done."""
    done = before.steps.keys()
    return {job.name: {step.kind for step in job.steps if step.id not in done} for job in after.jobs}


# ---- the graph ------------------------------------------------------------------------------------------


def test_plan_of_two_jobs_and_a_fusion_has_the_steps_in_order(world: Path) -> None:
    whole = plan(world)
    kinds = {job.name: [step.kind for step in job.steps] for job in whole.jobs}
    train = ["evaluate_base", "train", "evaluate", "register", "promote"]
    fused = ["fuse", "evaluate", "evaluate", "register", "promote", "release"]
    assert kinds == {"finance": train, "support": train, "fused": fused}
    assert {job.name: job.depends_on for job in whole.jobs} == {
        "finance": (),
        "support": (),
        "fused": ("finance", "support"),
    }


def test_plan_step_needs_only_steps_before_it(world: Path) -> None:
    whole = plan(world)
    seen: set[str] = set()
    for job in whole.jobs:
        for step in job.steps:
            assert set(step.needs) <= seen
            seen.add(step.id)


def test_plan_refers_to_steps_by_their_ids(world: Path) -> None:
    money, help_, fused = plan(world).jobs
    fusion = fused.step("fuse").what
    assert isinstance(fusion, FuseWhat)
    assert fusion.adapters == ((money.step("train").id, 1.0), (help_.step("train").id, 1.0))
    register = fused.step("register").what
    assert isinstance(register, RegisterWhat)
    assert register.parents == (money.step("register").id, help_.step("register").id)
    assert register.name == "tiny.multitask"
    assert register.base_scores == {
        "finance-sentiment": money.step("evaluate_base").id,
        "support": help_.step("evaluate_base").id,
    }
    promote = fused.step("promote").what
    assert isinstance(promote, PromoteWhat)
    assert promote.parent_scores == {
        "finance-sentiment": money.step("evaluate").id,
        "support": help_.step("evaluate").id,
    }
    evaluations = [step for step in fused.steps if step.kind == "evaluate"]
    assert promote.scores == {step.what.task: step.id for step in evaluations}  # type: ignore[union-attr]


def test_plan_gates_of_a_job_are_keyed_by_task(world: Path) -> None:
    evaluation = {"gates": {"macro_f1": ">=.8"}, "champion_margin": {"loss": 0.1}}
    promote = plan(world, money={"evaluation": evaluation}).jobs[0].step("promote").what
    assert isinstance(promote, PromoteWhat)
    assert promote.gates == {"finance-sentiment.macro_f1": ">= 0.8"}
    assert promote.champion_margin == {"finance-sentiment.loss": 0.1}


def test_plan_train_step_gives_the_spec_of_an_attempt(world: Path) -> None:
    what = plan(world).jobs[0].step("train").what
    assert isinstance(what, TrainWhat)
    spec = what.attempt("job-1", 3, "/home/checkpoints/x", str)
    assert (spec.job, spec.attempt, spec.checkpoint_dir) == ("job-1", 3, "/home/checkpoints/x")
    assert (spec.training.max_steps, spec.adapter.r) == (5, 16)


def test_plan_job_survives_being_stored(world: Path) -> None:
    for job in plan(world, money={"lora_target_modules": ["q_proj"], "max_grad_norm": None}).jobs:
        assert PlannedJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_plan_jobs_of_one_base_can_share_a_host(world: Path) -> None:
    money, help_, fused = plan(world).jobs
    assert money.host_key == help_.host_key == fused.host_key
    alone = plan(world, money={"resources": {"world_size": 1}}).jobs[0]
    assert (alone.world_size, money.world_size) == (1, 2)
    assert alone.host_key != money.host_key


# ---- ids ------------------------------------------------------------------------------------------------


def test_plan_made_again_redoes_nothing(world: Path) -> None:
    before, after = plan(world), plan(world)
    assert before == after
    assert redone(before, after) == {"finance": set(), "support": set(), "fused": set()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"money": {"learning_rate": 0.01}}, {"finance": AFTER_TRAIN, "fused": FUSED}),
        ({"money": {"seed": 3}}, {"finance": AFTER_TRAIN, "fused": FUSED}),
        ({"money": {"lora_r": 4}}, {"finance": AFTER_TRAIN, "fused": FUSED}),
        ({"money": {"gram_rows": 4}}, {"finance": AFTER_TRAIN, "fused": FUSED}),
        ({"money": {"gram_rows": 0}}, {}),
        ({"money": {"evaluation": {"gates": {"loss": "<= 9"}}}}, {"finance": {"promote"}}),
        ({"money": {"registry": {"promote": False}}}, {"finance": {"promote"}}),
        (
            {"money": {"registry": {"name": "other"}}},
            {"finance": {"register", "promote"}, "fused": {"register", "promote", "release"}},
        ),
        ({"money": {"evals_per_epoch": 3, "saves_per_epoch": 2, "max_bad_steps": 9}}, {}),
        ({"money": {"schedule": {"priority": "high"}}}, {}),
        ({"money": {"resources": {"world_size": 1}}}, {}),
        ({"money": {"evaluation": {"max_new_tokens": 9}}}, {}),
        (
            {"help_": {"evaluation": {"max_new_tokens": 9}}},
            {
                "support": {"evaluate_base", "evaluate", "register", "promote"},
                "fused": {"evaluate", "register", "promote", "release"},
            },
        ),
        ({"fused": {"rule": "svd", "rank": 8}}, {"fused": FUSED}),
        ({"fused": {"rule": "ties", "options": {"density": 0.3}}}, {"fused": FUSED}),
        ({"fused": {"evaluation": {}}}, {"fused": {"promote", "release"}}),
        ({"fused": {"release": {"out": "elsewhere"}}}, {"fused": {"release"}}),
        ({"fused": {"release": {"out": "out", "merged": True}}}, {"fused": {"release"}}),
        ({"fused": {"adapters": [{"job": "finance", "weight": 0.5}, {"job": "support"}]}}, {"fused": FUSED}),
    ],
)
def test_plan_change_redoes_what_depends_on_it_and_no_more(
    world: Path, changes: dict[str, Any], expected: dict[str, set[str]]
) -> None:
    nothing: dict[str, set[str]] = {"finance": set(), "support": set(), "fused": set()}
    assert redone(plan(world), plan(world, **changes)) == {**nothing, **expected}


def test_plan_changed_training_row_retrains_that_job_alone(world: Path) -> None:
    before = plan(world)
    file = world / "data" / "finance" / "train.jsonl"
    file.write_text(file.read_text().replace("headline 0", "headline zero"))
    assert redone(before, plan(world)) == {"finance": AFTER_TRAIN, "support": set(), "fused": FUSED}


def test_plan_changed_test_row_trains_nothing_again(world: Path) -> None:
    before = plan(world)
    file = world / "data" / "finance" / "test.jsonl"
    file.write_text(file.read_text().replace("headline 200", "headline two"))
    expected = {"evaluate_base", "evaluate", "register", "promote"}
    after = redone(before, plan(world))
    assert after["finance"] == expected
    assert after["fused"] == {"evaluate", "register", "promote", "release"}


def test_plan_changed_validation_row_redoes_nothing(world: Path) -> None:
    before = plan(world)
    file = world / "data" / "finance" / "validation.jsonl"
    file.write_text(file.read_text().replace("headline 100", "headline one"))
    assert not any(redone(before, plan(world)).values())


@pytest.mark.parametrize(
    ("keys", "same"),
    [
        ({"world_size": 1, "zero": "none", "slots": 2, "tokens_per_tick": 512}, True),
        ({"activation_checkpointing": True, "deepspeed": {"stage3_prefetch_bucket_size": 1}}, True),
        ({"dtype": "float64"}, False),
        ({"deepspeed": {"zero_quantized_nontrainable_weights": True}}, False),
    ],
)
def test_plan_follows_what_a_base_computes_not_how_it_is_held(
    world: Path, keys: dict[str, Any], same: bool
) -> None:
    before = plan(world)
    write_yaml(world / "bases" / "tiny.yaml", {"model": "tiny", **keys})
    assert (before.steps.keys() == plan(world).steps.keys()) == same


def test_plan_changed_tokenizer_redoes_everything(world: Path) -> None:
    before = plan(world)
    write_json(world / "bases" / "tiny" / "tokenizer.json", {"version": "2.0"})
    assert redone(before, plan(world)) == {"finance": ALL, "support": ALL, "fused": FUSED}


def test_plan_ids_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    ids = []
    for name in ("here", "there"):
        whole = plan(write_world(tmp_path / name))
        ids.append([step.id for job in whole.jobs for step in job.steps if step.kind != "release"])
    assert ids[0] == ids[1]


def test_plan_ids_do_not_depend_on_names_of_run_and_job(world: Path) -> None:
    adapters = [{"job": "renamed"}, {"job": "support"}]
    after = plan(world, money={"name": "renamed"}, fused={"name": "sum", "adapters": adapters}, name="again")
    assert plan(world).steps.keys() == after.steps.keys()


def test_plan_jobs_on_the_same_rows_share_the_base_evaluation(world: Path) -> None:
    jobs = [finance(name=f"f{seed}", seed=seed) for seed in (1, 2)]
    first, second = make_plan(load_pipeline(write_yaml(world / "p.yaml", pipeline(*jobs)))).jobs
    assert first.step("evaluate_base").id == second.step("evaluate_base").id
    assert first.step("train").id != second.step("train").id


def test_plan_of_two_jobs_that_train_the_same_adapter_is_refused(world: Path) -> None:
    file = write_yaml(world / "p.yaml", pipeline(finance(), finance(name="again")))
    with pytest.raises(BadInput, match="'finance' and 'again' train exactly the same adapter"):
        make_plan(load_pipeline(file))


# ---- registered parents ---------------------------------------------------------------------------------

CHAMPION = "tiny.support@champion"


def with_champion(world: Path, digests: dict[str, str]) -> Plan:
    write_yaml(world / "support.yaml", support())
    adapters = [{"job": "finance"}, {"adapter": CHAMPION, "recipe": "support.yaml"}]
    return plan(world, fused={"adapters": adapters}, digests=digests)


def test_plan_scores_a_registered_parent_itself(world: Path) -> None:
    fused = with_champion(world, {CHAMPION: "d1"}).jobs[-1]
    kinds = [step.kind for step in fused.steps]
    assert kinds == [
        "evaluate_base",
        "evaluate",
        "fuse",
        "evaluate",
        "evaluate",
        "register",
        "promote",
        "release",
    ]
    parent = fused.steps[1].what
    assert isinstance(parent, EvaluateWhat)
    assert (parent.adapter, parent.task) == (CHAMPION, "support")
    promote = fused.step("promote").what
    assert isinstance(promote, PromoteWhat)
    assert promote.parent_scores["support"] == fused.steps[1].id
    assert fused.depends_on == ("finance",)


def test_plan_follows_the_digest_a_registered_parent_has_now(world: Path) -> None:
    before, after = with_champion(world, {CHAMPION: "d1"}), with_champion(world, {CHAMPION: "d2"})
    assert redone(before, after) == {"finance": set(), "support": set(), "fused": FUSED}


def test_plan_with_a_parent_that_is_not_registered_is_refused(world: Path) -> None:
    with pytest.raises(BadInput, match=r"'tiny.support@champion' is not in the registry"):
        with_champion(world, {})


# ---- estimates ------------------------------------------------------------------------------------------


def test_plan_estimate_counts_the_parameters_of_the_targets(world: Path) -> None:
    estimate = (
        plan(world, money={"lora_r": 4, "lora_target_modules": ["q_proj", "gate_proj"]}).jobs[0].estimate
    )
    assert estimate is not None
    assert estimate.adapter_parameters == 2 * 4 * ((8 + 8) + (12 + 8))
    assert estimate.adapter_bytes == 4 * estimate.adapter_parameters
    assert (estimate.num_steps, estimate.train_rows) == (5, 10)


def test_plan_estimate_of_epochs_counts_short_last_batches(world: Path) -> None:
    changes = {"max_steps": None, "num_epochs": 2, "global_batch_size": 4}
    estimate = plan(world, money=changes).jobs[0].estimate
    assert estimate is not None
    assert estimate.num_steps == 2 * math.ceil(10 / 4)


@given(st.integers(1, 500), st.integers(1, 64), st.floats(0.01, 10), st.one_of(st.none(), st.integers(1, 99)))
def test_plan_counts_steps_as_the_host_does(rows: int, batch: int, epochs: float, steps: int | None) -> None:
    training = TrainingSpec(1e-3, batch, 64, num_epochs=None if steps else epochs, max_steps=steps)
    assert num_steps(training, rows) == host_num_steps(training, rows)


@pytest.mark.parametrize(("others", "team"), [("desk", "desk"), ("shop", None), (None, None)])
def test_fusion_takes_the_team_that_its_jobs_have_in_common(
    world: Path, others: str | None, team: str | None
) -> None:
    made = plan(world, money={"schedule": {"team": "desk"}}, help_={"schedule": {"team": others}})
    assert made.jobs[-1].team == team
