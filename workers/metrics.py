"""Metrics over scores and replies, each by the library that people compare with. Pure; no model here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The libraries are imported where they are used, for each takes a second or two: a host pays for those of the
# tasks that it scores, and not while it starts.


class _Words:
    """Words without punctuation, Chinese by the character; rouge-score's own tokenizer keeps a-z and 0-9."""

    def __init__(self) -> None:
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

        self._split = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        return [word for word in self._split(text.lower()).split() if any(map(str.isalnum, word))]


def means(rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over rows of each figure."""
    return {name: float(np.mean(values)) for name, values in rows.items()}


def corpus_chrf(replies: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 over all replies together, 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(replies), [list(references)]).score)


def reply_rows(replies: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """`rouge_l`: ROUGE-L F1 of each reply, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, replies, strict=True)
    return {"rouge_l": [float(scorer.score(ref, reply)["rougeL"].fmeasure) for ref, reply in pairs]}


def classification_metrics(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, and the unweighted mean of the F1 of `labels` (0 for a label never predicted)."""
    from sklearn.metrics import accuracy_score, f1_score

    nothing: Any = 0.0  # scikit-learn's annotation knows only its default, "warn"
    macro_f1 = f1_score(truth, predicted, labels=list(labels), average="macro", zero_division=nothing)
    return {"accuracy": float(accuracy_score(truth, predicted)), "macro_f1": float(macro_f1)}


def confusion(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Counts, rows truth and columns prediction, both in the order of `labels`."""
    from sklearn.metrics import confusion_matrix

    return tuple(map(tuple, confusion_matrix(truth, predicted, labels=list(labels)).tolist()))


def ranking_rows(scores: Sequence[Sequence[float]], targets: Sequence[int]) -> dict[str, list[float]]:
    """Hit@1, NDCG@5 and reciprocal rank of each row; `targets[i]` is the right index of `scores[i]`.

    With one right answer a row, its average precision is its reciprocal rank. A lone candidate is right.
    """
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    found: dict[str, list[float]] = {"hit_at_1": [], "ndcg_at_5": [], "mrr": []}
    for row, target in zip(scores, targets, strict=True):
        preds, relevant = np.array([row]), np.arange(len(row))[None] == target
        found["hit_at_1"].append(float(preds.argmax() == target))
        # scikit-learn takes no row of one, whose right answer has the first place.
        found["ndcg_at_5"].append(float(ndcg_score(relevant, preds, k=5)) if len(row) > 1 else 1.0)
        found["mrr"].append(float(label_ranking_average_precision_score(relevant, preds)))
    return found
