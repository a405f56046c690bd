"""What the plan of a training job and of a fusion are both made of. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.gate import lower_is_better, metric_name
from orchestrator.plan.steps import EvaluateWhat, FuseWhat, SearchWhat, Step, StepKind, What
from orchestrator.recipe.fuse_block import Parent, Search
from orchestrator.recipe.load import LoadedRecipe
from workers.manifest import json_digest
from workers.rules import as_given
from workers.types import DatasetSpec, EvaluationSpec, RuleOptions, SearchTask


def make_step(kind: StepKind, matters: Mapping[str, Any], needs: tuple[str, ...], what: What) -> Step:
    # Job names, run names and the order of jobs never enter: equal work has an equal id in every run.
    return Step(json_digest([kind, matters, sorted(needs)]), kind, needs, what)


PACE = ("evals_per_epoch", "saves_per_epoch", "max_bad_steps")


def evaluate(
    loaded: LoadedRecipe,
    adapter: str | None,
    bytes_id: str,
    needs: tuple[str, ...] = (),
    most: int | None = None,
) -> Step:
    """`bytes_id` stands for what is scored: a base's fingerprint, a step's id, or an adapter's digest.

    With `most`, by the first so many rows of each data set and without generated replies.
    """
    evaluation = loaded.recipe.evaluation_spec()
    evaluation = _shortened(evaluation, most) if most else evaluation
    what = EvaluateWhat(loaded.recipe.task, evaluation, loaded.test.digest, adapter)
    matters: dict[str, Any] = {
        "scored": bytes_id,
        "base": loaded.base.fingerprint,
        "rows": [rows_of(dataset) for dataset in evaluation.datasets],
        "digest": loaded.test.digest,
        "sequence_len": evaluation.sequence_len,
    }
    if loaded.recipe.task_type == "chat":
        matters["generate"] = [evaluation.max_new_tokens, evaluation.generate_samples]
    return make_step("evaluate" if adapter else "evaluate_base", matters, needs, what)


def _shortened(evaluation: EvaluationSpec, most: int) -> EvaluationSpec:
    datasets = tuple(
        replace(dataset, max_samples=min(most, dataset.max_samples or most))
        for dataset in evaluation.datasets
    )
    return replace(evaluation, datasets=datasets, generate_samples=0)


def rows_of(dataset: DatasetSpec) -> dict[str, Any]:
    """How rows are read, without where they lie: the digest of the files stands for that."""
    return {key: value for key, value in asdict(dataset).items() if key not in ("path", "split")}


@dataclass(frozen=True)
class Source:
    """One parent of a fusion: where its adapter, version and scores come from."""

    parent: Parent
    recipe: LoadedRecipe
    adapter: str
    bytes_id: str
    version: str
    evaluate_base: Step
    evaluate: Step
    own_steps: tuple[Step, ...]
    """Steps that no job of the pipeline does for it."""


def fuse_step(
    rule: str, rank: int | None, sources: Sequence[Source], options: RuleOptions | None = None
) -> Step:
    options = options or RuleOptions()
    adapters = tuple((source.adapter, source.parent.weight) for source in sources)
    matters = {
        "rule": rule,
        "rank": rank,
        "adapters": [[source.bytes_id, source.parent.weight] for source in sources],
        **({"options": as_given(options)} if as_given(options) else {}),
    }
    needs = tuple(source.adapter for source in sources if source.parent.job)
    return make_step("fuse", matters, needs, FuseWhat(rule, rank, adapters, options))


def search_step(search: Search, plain: Step, sources: Sequence[Source]) -> Step:
    """In place of `plain`, which fuses with the recipe's own weights."""
    assert isinstance(plain.what, FuseWhat)
    floors = {key.rpartition(".")[0]: (key, floor) for key, floor in search.floors.items()}
    tasks = tuple(
        _search_task(source.recipe, *floors[source.recipe.recipe.task], search) for source in sources
    )
    matters = {
        "first": plain.id,
        "base": sources[0].recipe.base.fingerprint,
        "tasks": [
            {
                "metric": task.metric,
                "floor": task.floor,
                "rows": [rows_of(dataset) for dataset in task.evaluation.datasets],
                "digest": source.recipe.validation.digest,
                "sequence_len": task.evaluation.sequence_len,
            }
            for task, source in zip(tasks, sources, strict=True)
        ],
        "trials": search.trials,
        "groups": list(search.groups),
        "seed": search.seed,
    }
    what = SearchWhat(plain.what, tasks, search.trials, search.groups, search.seed)
    return make_step("search", matters, plain.needs, what)


def _search_task(recipe: LoadedRecipe, key: str, floor: float, search: Search) -> SearchTask:
    validation = recipe.recipe.datasets_of("validation")
    evaluation = replace(recipe.recipe.evaluation_spec(), datasets=validation, generate_samples=0)
    if search.max_samples:
        evaluation = _shortened(evaluation, search.max_samples)
    return SearchTask(recipe.recipe.task, metric_name(key), lower_is_better(key), evaluation, floor)
