"""About how many tokens a job will train on, without loading a model: for what is told before it runs.

The host's own count (`workers.data`) is exact; this one renders messages without the chat template's frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.plan.steps import PlannedJob
from orchestrator.recipe.load import LoadedRecipe
from orchestrator.recipe.pipeline import LoadedPipeline
from workers.rows import messages, read_rows
from workers.types import DatasetSpec

SAMPLE = 500
"""Rows of each data set that are counted; the others are taken to be like them."""
FRAME = 4
"""Tokens that a chat template puts around one message: begin, role, line feed, end."""


def tokens_to_train(pipeline: LoadedPipeline, job: PlannedJob) -> int | None:
    """About so many tokens will be trained on, prompts included; None if the tokenizer cannot be read."""
    assert job.estimate is not None
    if job.kind == "fuse":
        return _distilled_tokens(pipeline, job.estimate.num_steps)
    recipe = pipeline.job(job.name)
    mean = _tokens_per_row(recipe)
    if mean is None:
        return None
    training = recipe.recipe.training_spec()
    if training.num_epochs is not None:
        return round(mean * recipe.train.rows * training.num_epochs)
    return round(mean * job.estimate.num_steps * training.global_batch_size)


def _distilled_tokens(pipeline: LoadedPipeline, num_steps: int) -> int | None:
    """Student and teacher read every row."""
    means = [_tokens_per_row(recipe) for _, recipe in pipeline.parents()]
    rows = [parent.rows or recipe.recipe.global_batch_size for parent, recipe in pipeline.parents()]
    if None in means:
        return None
    return round(2 * num_steps * sum(mean * count for mean, count in zip(means, rows, strict=True) if mean))


def _tokens_per_row(recipe: LoadedRecipe) -> float | None:
    return tokens_per_row(recipe.base.spec.path, recipe.train.datasets, recipe.recipe.sequence_len)


def tokens_per_row(base: str, datasets: Sequence[DatasetSpec], sequence_len: int) -> float | None:
    """Mean tokens of a row, cut at `sequence_len`; None if `base` has no tokenizer.json that can be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(Path(base) / "tokenizer.json"))
    except Exception:
        # The library raises plain Exception; a plan without this figure is still a plan.
        return None
    counts: list[int] = []
    for dataset in datasets:
        for row in read_rows(dataset)[:SAMPLE]:
            words = [message["content"] for message in messages(dataset, row)]
            encoded = tokenizer.encode_batch(words, add_special_tokens=False)
            counts.append(min(sequence_len, sum(len(one.ids) + FRAME for one in encoded)))
    return sum(counts) / len(counts) if counts else None
