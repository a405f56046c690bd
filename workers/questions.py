"""What a task asks of the model, and the report that its answers make.

No model here: passages to be scored and dialogues to be replied to go out, figures come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from workers import metrics
from workers.choices import Choice, encode_choices
from workers.data import encode_all
from workers.dialogues import Dialogue, read_dialogues
from workers.rows import messages, read_rows
from workers.score import Likelihood, Passage, choice_passages, row_passage
from workers.types import BadInput, DatasetSpec, EvaluationReport, EvaluationSpec


@dataclass(frozen=True)
class Questions:
    """`report` takes every score that the passages name, in order, and a reply to each dialogue."""

    passages: Sequence[Passage]
    dialogues: Sequence[Dialogue]
    report: Callable[[Sequence[Likelihood], Sequence[str]], EvaluationReport]


def read_questions(tokenizer: Any, spec: EvaluationSpec, share: bool) -> Questions:
    """`share`: whether answers may stand behind one prompt in one row (`workers.score.can_share`).

    No collectives, so that a rank can fail without its peers waiting. Raises BadInput, OSError.
    """
    match _task_of(spec.datasets).type:
        case "chat":
            return _chat(tokenizer, spec)
        case "classification":
            return _classification(tokenizer, spec, share)
        case "recommendation":
            return _recommendation(tokenizer, spec, share)


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


def _chat(tokenizer: Any, spec: EvaluationSpec) -> Questions:
    rows, dialogues = encode_all(tokenizer, spec.datasets, spec.sequence_len), read_dialogues(tokenizer, spec)
    passages = [row_passage(row, score) for score, row in enumerate(rows)]

    def report(scores: Sequence[Likelihood], replies: Sequence[str]) -> EvaluationReport:
        return _chat_report(scores, dialogues, replies)

    return Questions(passages, dialogues, report)


def _classification(tokenizer: Any, spec: EvaluationSpec, share: bool) -> Questions:
    rows, choices = _read_choices(tokenizer, spec)
    labels = spec.datasets[0].labels

    def report(scores: Sequence[Likelihood], _: Sequence[str]) -> EvaluationReport:
        return _classification_report(labels, rows, _by_choice(scores, choices))

    return Questions(_choice_passages(choices, share), (), report)


def _recommendation(tokenizer: Any, spec: EvaluationSpec, share: bool) -> Questions:
    rows, choices = _read_choices(tokenizer, spec)

    def report(scores: Sequence[Likelihood], _: Sequence[str]) -> EvaluationReport:
        return _recommendation_report(spec.datasets[0], rows, _by_choice(scores, choices))

    return Questions(_choice_passages(choices, share), (), report)


def _read_choices(tokenizer: Any, spec: EvaluationSpec) -> tuple[list[dict[str, Any]], list[Choice]]:
    rows: list[dict[str, Any]] = []
    choices: list[Choice] = []
    for dataset in spec.datasets:
        own = read_rows(dataset)
        rows += own
        choices += encode_choices(tokenizer, dataset, own, spec.sequence_len)
    return rows, choices


def _bounds(choices: Sequence[Choice]) -> list[int]:
    """Where each choice's scores begin, and where the last one's stop."""
    return list(accumulate((len(choice.answers) for choice in choices), initial=0))


def _choice_passages(choices: Sequence[Choice], share: bool) -> list[Passage]:
    firsts = _bounds(choices)[:-1]
    return [
        passage
        for choice, first in zip(choices, firsts, strict=True)
        for passage in choice_passages(choice, first, share)
    ]


def _by_choice(scores: Sequence[Likelihood], choices: Sequence[Choice]) -> list[Sequence[Likelihood]]:
    """The likelihood of every answer of every choice."""
    return [scores[start:stop] for start, stop in pairwise(_bounds(choices))]


# ---- the three tasks' reports ------------------------------------------------------------------------


def _chat_report(
    scores: Sequence[Likelihood], dialogues: Sequence[Dialogue], replies: Sequence[str]
) -> EvaluationReport:
    loss = _loss(scores)
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 is past the largest double
        "token_accuracy": sum(score.correct for score in scores) / sum(score.tokens for score in scores),
    }
    columns = _likelihood_rows(scores) | {"correct": tuple(float(score.correct) for score in scores)}
    if dialogues:
        references = [dialogue.reference for dialogue in dialogues]
        replied = metrics.reply_rows(replies, references)
        found |= metrics.means(replied) | {"chrf": metrics.corpus_chrf(replies, references)}
        columns |= {name: tuple(values) for name, values in replied.items()}
    predictions = tuple(
        {"prompt": dialogue.words, "reference": dialogue.reference, "reply": reply}
        for dialogue, reply in zip(dialogues, replies, strict=True)
    )
    return EvaluationReport("chat", found, len(scores), predictions, row_scores=columns)


def _classification_report(
    labels: tuple[str, ...], rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[Likelihood]]
) -> EvaluationReport:
    truth = [row["label"] for row in rows]
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


def _recommendation_report(
    dataset: DatasetSpec, rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[Likelihood]]
) -> EvaluationReport:
    targets = [row["candidates"].index(row["target"]) for row in rows]
    logs = [[score.log_likelihood for score in row] for row in scores]
    ranked = metrics.ranking_rows(logs, targets)
    found = metrics.means(ranked)
    right = [row[target] for row, target in zip(scores, targets, strict=True)]
    found["loss"] = _loss(right)
    columns = _likelihood_rows(right) | {name: tuple(values) for name, values in ranked.items()}
    predictions = tuple(
        {
            "prompt": messages(dataset, row)[-2]["content"],
            "target": row["target"],
            "predicted": row["candidates"][_argmax(log)],
            "rank": 1 + sum(other > log[target] for other in log),
            "log_likelihoods": dict(zip(row["candidates"], log, strict=True)),
        }
        for row, target, log in zip(rows, targets, logs, strict=True)
    )
    return EvaluationReport("recommendation", found, len(rows), predictions, row_scores=columns)


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
