"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from workers.metrics import classification_metrics, confusion, corpus_chrf, means, ranking_rows, reply_rows

LABELS = ("bad", "good", "mixed")


def ranking_metrics(scores, targets):
    return means(ranking_rows(scores, targets))


def reply_metrics(replies, references):
    return means(reply_rows(replies, references)) | {"chrf": corpus_chrf(replies, references)}


def test_ranking_metrics_log_likelihoods_equal_hand_computed_values():
    scores = [
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],  # target first
        [-900.0, -1.5, -0.5, -40.0, -7.0, -8.0],  # target third; another far below any exponential
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],  # target last
    ]
    found = ranking_metrics(scores, [0, 4, 5])
    assert found["hit_at_1"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 3)
    assert found["ndcg_at_5"] == pytest.approx((1 + 1 / math.log2(4) + 0) / 3)


def test_ranking_metrics_target_least_likely_still_has_a_rank():
    assert ranking_metrics([[-1.0, -2.0]], [1]) == pytest.approx(
        {"hit_at_1": 0.0, "ndcg_at_5": 1 / math.log2(3), "mrr": 0.5}
    )


def test_ranking_metrics_of_a_lone_candidate_are_those_of_a_right_answer():
    found = ranking_rows([[-1.0], [-1.0, -2.0]], [0, 1])
    assert {name: values[0] for name, values in found.items()} == {"hit_at_1": 1, "ndcg_at_5": 1, "mrr": 1}
    assert {name: values[1] for name, values in found.items()} == pytest.approx(
        {"hit_at_1": 0, "ndcg_at_5": 1 / math.log2(3), "mrr": 0.5}
    )


def test_classification_metrics_equal_hand_computed_values():
    truth = ["bad", "bad", "good", "good"]
    predicted = ["bad", "good", "good", "good"]
    found = classification_metrics(truth, predicted, LABELS)
    # F1: bad 2/3, good 4/5, and mixed, which never occurs, 0.
    assert found == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 4 / 5 + 0) / 3})


def test_confusion_rows_are_truth_in_the_order_of_labels():
    assert confusion(["bad", "bad", "good"], ["good", "bad", "good"], LABELS) == (
        (1, 1, 0),
        (0, 1, 0),
        (0, 0, 0),
    )


def test_reply_metrics_equal_texts_are_perfect_and_disjoint_ones_zero():
    texts = ["The order ships today.", "营业时间是十点。"]
    assert reply_metrics(texts, texts) == pytest.approx({"rouge_l": 1.0, "chrf": 100.0})
    assert reply_metrics(["xyz"], ["Ships at noon"]) == pytest.approx({"rouge_l": 0.0, "chrf": 0.0})


@pytest.mark.parametrize(
    ("reply", "reference", "recall", "precision"),
    [
        ("your order ships", "Your order, it ships today!", 3 / 5, 1),
        ("营业时间", "营业到十点", 2 / 5, 2 / 4),
        ("电话 010-12", "电话是 010-12", 4 / 5, 1),  # 电, 话, 010, 12 of 电, 话, 是, 010, 12
    ],
)
def test_reply_metrics_rouge_l_equals_hand_computed_values(reply, reference, recall, precision):
    expected = 2 * recall * precision / (recall + precision)
    assert reply_metrics([reply], [reference])["rouge_l"] == pytest.approx(expected)


def test_reply_metrics_empty_reply_scores_zero():
    assert reply_metrics([""], ["Hello"]) == pytest.approx({"rouge_l": 0.0, "chrf": 0.0})
