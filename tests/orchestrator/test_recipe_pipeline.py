"""A pipeline file: jobs under defaults, and a fusion of their adapters."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orchestrator.recipe.pipeline import json_schema, load_pipeline
from tests.orchestrator.recipe_files import (
    finance,
    fuse,
    line_of,
    pipeline,
    support,
    write_base,
    write_world,
    write_yaml,
)
from workers.types import BadInput


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_yaml(write_world(tmp_path) / "finance.yaml", finance())
    return tmp_path


def load(world: Path, *jobs: Any, **rest: Any) -> Any:
    return load_pipeline(write_yaml(world / "demo.yaml", pipeline(*jobs, **rest)))


def refused(world: Path, at: str, *jobs: Any, **rest: Any) -> str:
    """The sentence that refuses the pipeline, checked to name the file and the line that holds `at`."""
    with pytest.raises(BadInput) as error:
        load(world, *jobs, **rest)
    file = world / "demo.yaml"
    assert str(error.value).startswith(f"{file}:{line_of(file, at)}: "), str(error.value)
    return str(error.value)


# ---- jobs -----------------------------------------------------------------------------------------------


def test_pipeline_jobs_come_from_files_and_in_place(world: Path) -> None:
    loaded = load(world, "finance.yaml", support(), fuse=fuse())
    assert [job.recipe.name for job in loaded.jobs] == ["finance", "support"]
    assert [parent.label for parent, _ in loaded.parents()] == ["finance", "support"]
    assert loaded.external_adapters == ()


def test_pipeline_of_a_single_recipe_file_is_that_job_alone(world: Path) -> None:
    loaded = load_pipeline(world / "finance.yaml")
    assert (loaded.name, loaded.fuse, len(loaded.jobs)) == ("finance", None, 1)


def test_pipeline_defaults_lie_under_each_job(world: Path) -> None:
    bare = support(base_model=None, sequence_len=None, max_steps=None, seed=9)
    defaults = {
        "base_model": "bases/tiny.yaml",
        "sequence_len": 32,
        "num_epochs": 1,
        "seed": 5,
        "lora_rank": 4,
    }
    defaults |= {"evaluation": {"max_new_tokens": 7}}
    job = {**bare, "evaluation": {"generate_samples": 3}}
    loaded = load(world, "finance.yaml", job, defaults=defaults)
    first, second = (job.recipe for job in loaded.jobs)
    assert (first.sequence_len, first.seed, first.lora_r) == (64, 5, 4)
    assert (second.sequence_len, second.seed) == (32, 9)
    assert (second.evaluation.max_new_tokens, second.evaluation.generate_samples) == (7, 3)
    assert (first.max_steps, first.num_epochs) == (5, None)
    assert (second.max_steps, second.num_epochs) == (None, 1)
    assert len(loaded.notices) == 1


def test_pipeline_paths_are_relative_to_the_file_they_are_written_in(world: Path) -> None:
    folder = world / "jobs"
    folder.mkdir()
    datasets = [{**finance()["datasets"][0], "path": "../data/finance"}]
    write_yaml(folder / "finance.yaml", finance(base_model=None, datasets=datasets))
    loaded = load(world, "jobs/finance.yaml", defaults={"base_model": "bases/tiny.yaml"})
    recipe = loaded.jobs[0].recipe
    assert recipe.base_model == str(world / "bases" / "tiny.yaml")
    assert recipe.datasets[0].path == str(world / "data" / "finance")
    assert recipe.canonical()["base_model"] == "../bases/tiny.yaml"


def test_pipeline_mistake_in_defaults_names_the_pipeline_and_its_line(world: Path) -> None:
    sentence = refused(world, "lora_rnk", "finance.yaml", defaults={"lora_rnk": 4})
    assert "did you mean 'lora_r'?" in sentence


def test_pipeline_mistake_in_a_job_file_names_that_file(world: Path) -> None:
    file = write_yaml(world / "finance.yaml", finance(lora_rnk=3))
    with pytest.raises(BadInput) as error:
        load(world, "finance.yaml")
    assert str(error.value).startswith(f"{file}:{line_of(file, 'lora_rnk')}: unknown key 'lora_rnk'")


@pytest.mark.parametrize(
    ("changes", "at", "words"),
    [
        ({"job": ["finance.yaml"]}, "job:", "unknown key 'job'; did you mean 'jobs'?"),
        ({"fuse": fuse(rnk=2)}, "rnk", "unknown key 'fuse.rnk'; did you mean 'rank'?"),
        ({"defaults": "x"}, "defaults", "defaults should be a block of keys and values"),
        ({"name": None}, "name", "name should be a valid string"),
    ],
)
def test_pipeline_with_a_wrong_key_or_value_is_refused(
    world: Path, changes: dict[str, Any], at: str, words: str
) -> None:
    assert words in refused(world, at, "finance.yaml", support(), **changes)


def test_pipeline_without_jobs_is_refused(world: Path) -> None:
    assert "jobs should have at least 1 item" in refused(world, "jobs")


def test_pipeline_job_file_that_is_not_there_is_named(world: Path) -> None:
    assert f"no such recipe file: {world / 'none.yaml'}" in refused(world, "none.yaml", "none.yaml")


def test_pipeline_two_jobs_of_one_name_are_refused(world: Path) -> None:
    assert "two jobs are named 'finance'" in refused(world, "- version", "finance.yaml", finance())


# ---- fusion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "at", "words"),
    [
        (fuse({"job": "finnance"}), "finnance", "no job is named 'finnance'; there are "),
        (fuse(name="finance"), "name: finance", "a job is named 'finance' already"),
        (fuse(rule="svd"), "fuse:", "rule 'svd' needs a rank of 1 or more (or an energy or a bucket)"),
        (fuse(rank=4), "fuse:", "rule 'cat' takes no rank; leave out rank: 4, or use rule 'svd'"),
        (fuse(rule="tees"), "rule", "fuse.rule: rule 'tees' is unknown; did you mean 'ties'?"),
        (fuse(rule="random"), "rule", "fuse.rule: rule 'random' is unknown; did you mean "),
        (fuse(options={"density": 0.5}), "fuse:", "rule 'cat' takes no density; leave it out"),
        (
            fuse(rule="ties", options={"density": 2}),
            "fuse:",
            "density is 2.0; it must be above 0 and at most",
        ),
        (fuse(rule="dare", options={"seed": -1}), "fuse:", "seed is -1; it must be 0 or more"),
        (fuse(rule="svd", options={"bucket": 48}), "fuse:", "vLLM has no bucket 48; the nearest is "),
        (fuse(rule="svd", rank=4, options={"energy": 0.9}), "fuse:", "rank and energy are two ways to cut"),
        (
            fuse(rule="ties", options={"densty": 2}),
            "densty",
            "unknown key 'fuse.options.densty'; did you mean 'density'",
        ),
        (
            fuse({"job": "finance", "weight": -1}, rule="regmean"),
            "fuse:",
            "rule 'regmean' divides by the weights; give weights of 0 or more",
        ),
        (fuse(rule="distill", distill={"max_steps": 3}), "fuse:", "rule distill needs a rank and takes no"),
        (fuse(rule="distill", rank=4), "fuse:", "a distill block is needed for rule distill"),
        (fuse(distill={"max_steps": 3}), "fuse:", "a distill block is needed for rule distill, and only"),
        (fuse({"job": "finance", "rows": 4}), "fuse:", "share and rows of an adapter are for rule distill"),
        (fuse(controls={"joint": True}), "fuse:", "controls.joint needs rule distill"),
        (
            fuse(rule="distill", rank=4, distill={"max_steps": 3, "labels": 1.0}),
            "labels",
            "fuse.distill.labels should be less than 1",
        ),
        (
            fuse(rule="distill", rank=4, distill={"max_steps": 3, "temprature": 2}),
            "temprature",
            "did you mean 'temperature'",
        ),
        (
            fuse({"job": "finance", "adapter": "a@b", "recipe": "x"}),
            "- job",
            "exactly one of job and adapter",
        ),
        (fuse({"weight": 1.0}), "- weight", "exactly one of job and adapter"),
        (fuse({"adapter": "a@champion"}), "- adapter", "needs the recipe it is judged by"),
        (
            fuse({"adapter": "champion", "recipe": "finance.yaml"}),
            "- adapter",
            "fuse.adapters[0].adapter should",
        ),
        (fuse({"adapter": "a@champion", "recipe": "no.yaml"}), "recipe: no", "no such recipe file"),
        (fuse({"job": "finance"}, {"job": "finance"}), "fuse:", "two adapters have the task"),
        (
            fuse(evaluation={"gates": {"macro_f1": ">= 0.8"}}),
            "macro_f1",
            "did you mean 'finance-sentiment.macro_f1'",
        ),
        (fuse(evaluation={"gates": {"support.macro_f1": ">= 0.8"}}), "support.macro", "is not measured here"),
        (
            fuse(evaluation={"retention": {"support.loss": "<= 0.6"}}),
            "support.loss",
            "more retention is better",
        ),
        (
            fuse(evaluation={"retention": {"suport.loss": ">= 0.6"}}),
            "suport.loss",
            "did you mean 'support.loss'",
        ),
        (fuse(release={"out": "o"}, registry={"promote": False}), "fuse:", "registry.promote must be true"),
    ],
)
def test_fusion_that_cannot_be_made_or_judged_is_refused(
    world: Path, block: dict[str, Any], at: str, words: str
) -> None:
    jobs = (write_yaml(world / "finance.yaml", finance()).name, write_yaml(world / "s.yaml", support()).name)
    file = write_yaml(world / "demo.yaml", pipeline(*jobs, fuse=block))
    with pytest.raises(BadInput) as error:
        load_pipeline(file)
    assert words in str(error.value)
    if at != "fuse:":
        assert str(error.value).startswith(f"{file}:{line_of(file, at)}: "), str(error.value)


def test_fusion_of_adapters_on_two_bases_is_refused(world: Path) -> None:
    write_base(world / "bases" / "other", seed=1)
    jobs = ("finance.yaml", support(base_model="bases/other"))
    with pytest.raises(
        BadInput, match="'support' has another base than 'finance'; only one base can be fused"
    ):
        load(world, *jobs, fuse=fuse())


def test_fusion_with_a_registered_adapter_loads_the_recipe_that_judges_it(world: Path) -> None:
    write_yaml(world / "support.yaml", support())
    block = fuse(
        {"job": "finance"}, {"adapter": "tiny.support@champion", "recipe": "support.yaml", "weight": 0.5}
    )
    loaded = load(world, "finance.yaml", fuse=block)
    assert loaded.external_adapters == ("tiny.support@champion",)
    assert [recipe.recipe.task for _, recipe in loaded.parents()] == ["finance-sentiment", "support"]


def test_fusion_release_folder_is_relative_to_the_pipeline_file(world: Path) -> None:
    loaded = load(world, "finance.yaml", support(), fuse=fuse(release={"out": "../out"}))
    assert loaded.fuse.release.out == str(world.parent / "out")
    assert loaded.canonical()["fuse"]["release"]["out"] == "../out"


# ---- hash and schema ------------------------------------------------------------------------------------


def test_pipeline_hash_ignores_where_keys_are_written(world: Path) -> None:
    in_jobs = load(world, finance(seed=7), support(seed=7), fuse=fuse())
    in_defaults = load(world, finance(), support(), defaults={"seed": 7}, fuse=fuse(evaluation={}, rank=None))
    other = load(world, finance(seed=8), support(seed=7), fuse=fuse())
    assert in_jobs.content_hash() == in_defaults.content_hash() != other.content_hash()


def test_pipeline_schema_accepts_pipelines_and_refuses_a_misspelt_key(world: Path) -> None:
    good = pipeline(
        "finance.yaml", support(base_model=None), fuse=fuse(), defaults={"base_model": "bases/tiny"}
    )
    jsonschema.validate(good, json_schema())
    for bad in (pipeline("finance.yaml", fusion=fuse()), pipeline("a", fuse=fuse(rul="cat")), pipeline()):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, json_schema())
