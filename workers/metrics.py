"""Metrics over scores and replies, each by the library that people compare with. Pure; no model here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    label_ranking_average_precision_score,
    ndcg_score,
)


class _Words:
    """Words without punctuation, Chinese by the character; rouge-score's own tokenizer keeps a-z and 0-9."""

    def __init__(self) -> None:
        self._split = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        return [word for word in self._split(text.lower()).split() if any(map(str.isalnum, word))]


def reply_metrics(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge_l`: mean ROUGE-L F1, 0 to 1. `chrf`: corpus chrF2, 0 to 100."""
    # It brings nltk, two seconds that a host without dialogues need not spend.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    f1 = [scorer.score(ref, reply)["rougeL"].fmeasure for ref, reply in zip(references, replies, strict=True)]
    chrf = CHRF().corpus_score(list(replies), [list(references)]).score
    return {"rouge_l": sum(f1) / len(f1), "chrf": float(chrf)}


def classification_metrics(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, and the unweighted mean of the F1 of `labels` (0 for a label never predicted)."""
    nothing: Any = 0.0  # scikit-learn's annotation knows only its default, "warn"
    macro_f1 = f1_score(truth, predicted, labels=list(labels), average="macro", zero_division=nothing)
    return {"accuracy": float(accuracy_score(truth, predicted)), "macro_f1": float(macro_f1)}


def confusion(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Counts, rows truth and columns prediction, both in the order of `labels`."""
    return tuple(map(tuple, confusion_matrix(truth, predicted, labels=list(labels)).tolist()))


def ranking_metrics(scores: Sequence[Sequence[float]], targets: Sequence[int]) -> dict[str, float]:
    """Mean over rows of Hit@1, NDCG@5 and reciprocal rank; `targets[i]` is the right index of `scores[i]`.

    With one right answer a row, its average precision is its reciprocal rank.
    """
    hits, gains, reciprocals = [], [], []
    for row, target in zip(scores, targets, strict=True):
        preds, relevant = np.array([row]), np.arange(len(row))[None] == target
        hits.append(float(preds.argmax() == target))
        gains.append(ndcg_score(relevant, preds, k=5))
        reciprocals.append(label_ranking_average_precision_score(relevant, preds))
    means = {"hit_at_1": hits, "ndcg_at_5": gains, "mrr": reciprocals}
    return {name: float(np.mean(values)) for name, values in means.items()}
