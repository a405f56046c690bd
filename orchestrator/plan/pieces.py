"""What the plan of a training job and of a fusion are both made of. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.plan.steps import EvaluateWhat, FuseWhat, Step, StepKind, What
from orchestrator.recipe.fuse_block import Parent
from orchestrator.recipe.load import LoadedRecipe
from workers.manifest import json_digest
from workers.types import DatasetSpec, EvaluationSpec


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


def fuse_step(rule: str, rank: int | None, sources: Sequence[Source]) -> Step:
    adapters = tuple((source.adapter, source.parent.weight) for source in sources)
    matters = {
        "rule": rule,
        "rank": rank,
        "adapters": [[source.bytes_id, source.parent.weight] for source in sources],
    }
    needs = tuple(source.adapter for source in sources if source.parent.job)
    return make_step("fuse", matters, needs, FuseWhat(rule, rank, adapters))
