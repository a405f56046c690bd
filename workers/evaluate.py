"""Score the resident model on one task: likelihoods and replies in, an `EvaluationReport` out.

The caller has set the adapter for every row. Reports are the same on every rank and for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch

from workers import metrics
from workers.choices import Choice, encode_choices
from workers.data import encode_all
from workers.dialogues import Dialogue, read_dialogues
from workers.generate import greedy_replies
from workers.ranks import Ranks
from workers.rows import Row, messages, read_rows
from workers.score import Likelihood, Passage, can_share, choice_passages, likelihoods, row_passage
from workers.types import BadInput, DatasetSpec, EvaluationReport, EvaluationSpec

T = TypeVar("T")


@dataclass(frozen=True)
class _Judge:
    """The model that is scored, on this rank, and its peers."""

    model: Any
    tokenizer: Any
    ranks: Ranks
    device: torch.device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


def evaluate(
    model: Any, tokenizer: Any, ranks: Ranks, spec: EvaluationSpec, device: torch.device
) -> EvaluationReport:
    """Score `model`, a causal LM whose head is wrapped by `workers.head.install`. Collective.

    Raises BadInput, on every rank alike, for rows that cannot be used or scores that are not finite.
    """
    judge = _Judge(model, tokenizer, ranks, device)
    training = model.training
    model.eval()
    try:
        match _task_of(spec.datasets).type:
            case "chat":
                return _chat(judge, spec)
            case "classification":
                return _classification(judge, spec)
            case "recommendation":
                return _recommendation(judge, spec)
    finally:
        model.train(training)


def _task_of(datasets: Sequence[DatasetSpec]) -> DatasetSpec:
    """The data set that stands for all: they must be of one type and have the same labels."""
    if not datasets:
        raise BadInput("evaluation: it names no data set; give it at least one")
    for other in datasets[1:]:
        if (other.type, other.labels) != (datasets[0].type, datasets[0].labels):
            raise BadInput(
                f"evaluation: {other.path} differs from {datasets[0].path} in type or labels; "
                "evaluate them as two tasks"
            )
    return datasets[0]


# ---- the three tasks --------------------------------------------------------------------------------


def _chat(judge: _Judge, spec: EvaluationSpec) -> EvaluationReport:
    rows, dialogues = _agreed(judge.ranks, lambda: _read_chat(judge.tokenizer, spec))
    scores = _scores(judge, [row_passage(row, score) for score, row in enumerate(rows)])
    loss = _loss(scores)
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 is past the largest double
        "token_accuracy": sum(score.correct for score in scores) / sum(score.tokens for score in scores),
    }
    columns = _likelihood_rows(scores) | {"correct": tuple(float(score.correct) for score in scores)}
    replies, references = _replies(judge, dialogues, spec.max_new_tokens), [d.reference for d in dialogues]
    if dialogues:
        replied = metrics.reply_rows(replies, references)
        found |= metrics.means(replied) | {"chrf": metrics.corpus_chrf(replies, references)}
        columns |= {name: tuple(values) for name, values in replied.items()}
    predictions = tuple(
        {"prompt": dialogue.words, "reference": dialogue.reference, "reply": reply}
        for dialogue, reply in zip(dialogues, replies, strict=True)
    )
    return EvaluationReport("chat", found, len(rows), predictions, row_scores=columns)


def _classification(judge: _Judge, spec: EvaluationSpec) -> EvaluationReport:
    rows, choices = _agreed(judge.ranks, lambda: _read_choices(judge.tokenizer, spec))
    labels, truth = spec.datasets[0].labels, [row["label"] for row in rows]
    scores = _choice_scores(judge, choices)
    logs = [[score.log_likelihood for score in row] for row in scores]
    predicted = [labels[_argmax(row)] for row in logs]
    found = metrics.classification_metrics(truth, predicted, labels)
    right = [row[labels.index(label)] for row, label in zip(scores, truth, strict=True)]
    found["loss"] = _loss(right)
    columns = _likelihood_rows(right)
    for name, words in (("truth", truth), ("predicted", predicted)):
        columns[name] = tuple(float(labels.index(word)) for word in words)
    predictions = tuple(
        {
            "text": row["text"],
            "label": row["label"],
            "predicted": guess,
            "probabilities": _shares(labels, log),
        }
        for row, guess, log in zip(rows, predicted, logs, strict=True)
    )
    table = metrics.confusion(truth, predicted, labels)
    return EvaluationReport("classification", found, len(rows), predictions, labels, table, columns)


def _recommendation(judge: _Judge, spec: EvaluationSpec) -> EvaluationReport:
    rows, choices = _agreed(judge.ranks, lambda: _read_choices(judge.tokenizer, spec))
    targets = [row["candidates"].index(row["target"]) for row in rows]
    scores = _choice_scores(judge, choices)
    logs = [[score.log_likelihood for score in row] for row in scores]
    ranked = metrics.ranking_rows(logs, targets)
    found = metrics.means(ranked)
    right = [row[target] for row, target in zip(scores, targets, strict=True)]
    found["loss"] = _loss(right)
    columns = _likelihood_rows(right) | {name: tuple(values) for name, values in ranked.items()}
    predictions = tuple(
        {
            "prompt": messages(spec.datasets[0], row)[-2]["content"],
            "target": row["target"],
            "predicted": row["candidates"][_argmax(log)],
            "rank": 1 + sum(other > log[target] for other in log),
            "log_likelihoods": dict(zip(row["candidates"], log, strict=True)),
        }
        for row, target, log in zip(rows, targets, logs, strict=True)
    )
    return EvaluationReport("recommendation", found, len(rows), predictions, row_scores=columns)


# ---- reading: no collectives, so that a rank can fail without its peers waiting ---------------------


def _read_chat(tokenizer: Any, spec: EvaluationSpec) -> tuple[list[Row], list[Dialogue]]:
    return encode_all(tokenizer, spec.datasets, spec.sequence_len), read_dialogues(tokenizer, spec)


def _read_choices(tokenizer: Any, spec: EvaluationSpec) -> tuple[list[dict[str, Any]], list[Choice]]:
    rows: list[dict[str, Any]] = []
    choices: list[Choice] = []
    for dataset in spec.datasets:
        own = read_rows(dataset)
        rows += own
        choices += encode_choices(tokenizer, dataset, own, spec.sequence_len)
    return rows, choices


def _agreed(ranks: Ranks, read: Callable[[], T]) -> T:
    """What `read` gives, once every rank has it. Raises BadInput on all if it fails on one."""
    value, problem = None, ""
    try:
        value = read()
    except (BadInput, OSError) as error:
        problem = str(error)
    for found in ranks.gather(problem):
        if found:
            raise BadInput(found)
    assert value is not None
    return value


# ---- the model at work ------------------------------------------------------------------------------


def _scores(judge: _Judge, passages: Sequence[Passage]) -> list[Likelihood]:
    scores = likelihoods(judge.model, passages, judge.ranks, judge.device, judge.pad_id)
    if not all(math.isfinite(score.log_likelihood) for score in scores):
        raise BadInput(
            "the scores are not finite numbers: the adapter has diverged; train it again more gently"
        )
    return scores


def _choice_scores(judge: _Judge, choices: Sequence[Choice]) -> list[list[Likelihood]]:
    """The likelihood of every answer of every choice."""
    bounds = list(accumulate((len(choice.answers) for choice in choices), initial=0))
    share = can_share(judge.model)
    passages: list[Passage] = []
    for choice, first in zip(choices, bounds[:-1], strict=True):
        passages += choice_passages(choice, first, share)
    scores = _scores(judge, passages)
    return [scores[start:stop] for start, stop in pairwise(bounds)]


def _replies(judge: _Judge, dialogues: Sequence[Dialogue], max_new_tokens: int) -> list[str]:
    if not dialogues:
        return []
    prompts = [dialogue.prompt for dialogue in dialogues]
    stop_ids = sorted({token for dialogue in dialogues for token in dialogue.stop_ids})
    replies = greedy_replies(
        judge.model, prompts, max_new_tokens, stop_ids, judge.pad_id, judge.ranks, judge.device
    )
    return [text.strip() for text in judge.tokenizer.batch_decode(replies, skip_special_tokens=True)]


# ---- arithmetic -------------------------------------------------------------------------------------


def _loss(scores: Sequence[Likelihood]) -> float:
    """Mean negative log-likelihood over all target tokens, as training has it."""
    return -math.fsum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores)


def _likelihood_rows(scores: Sequence[Likelihood]) -> dict[str, tuple[float, ...]]:
    """Of each row's target: negative log-likelihood in nats, and tokens."""
    return {
        "nll": tuple(-score.log_likelihood for score in scores),
        "tokens": tuple(float(score.tokens) for score in scores),
    }


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _shares(labels: Sequence[str], logs: Sequence[float]) -> dict[str, float]:
    """Softmax over the labels."""
    shares = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
    return dict(zip(labels, shares, strict=True))
