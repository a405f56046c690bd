"""Intervals by bootstrap, and verdicts that rest on rows: non-inferiority, same rows, the worst task."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from orchestrator.bootstrap import interval, paired_difference
from orchestrator.contracts import Scores
from orchestrator.judgement import Conditions, Evidence, as_json, judge, read_conditions
from orchestrator.structure import Structure
from workers.outline import Outline
from workers.types import BadInput, EvaluationReport

LABELS = ("negative", "neutral", "positive")
KEY = "sentiment.macro_f1"


def classified(right: float, rows: int = 400, seed: int = 0, digest: str = "d" * 64) -> Scores:
    """An adapter that labels the share `right` of the same rows as they should be."""
    random = np.random.default_rng(seed)
    truth = np.arange(rows) % 3
    predicted = np.where(random.random(rows) < right, truth, (truth + 1) % 3)
    columns = {"truth": tuple(map(float, truth)), "predicted": tuple(map(float, predicted))}
    metrics = {
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "accuracy": float((truth == predicted).mean()),
    }
    report = EvaluationReport("classification", metrics, rows, (), LABELS, row_scores=columns)
    return Scores("sentiment", "tickets/test.jsonl", digest, report)


def chat(nll: float, task: str = "support") -> Scores:
    columns = {"nll": (nll, 2 * nll), "tokens": (2.0, 4.0), "correct": (1.0, 4.0)}
    metrics = {"loss": nll / 2, "perplexity": float(np.exp(nll / 2)), "token_accuracy": 5 / 6, "chrf": 40.0}
    return Scores(
        task, "x/test.jsonl", "c" * 64, EvaluationReport("chat", metrics, 2, (), row_scores=columns)
    )


SOUND = Structure(Outline(r=8, lora_alpha=8, ranks={"q_proj": 8}, scales={"q_proj": 1.0}))


def verdict(ours, champion=None, parents=None, structure=SOUND, fused=False, **asked):
    champion = None if champion is None else [champion]
    return judge([Conditions(**asked)], Evidence([ours], parents or {}, champion, structure, fused))


# ---- intervals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_interval_holds_the_score_and_narrows_with_the_root_of_the_rows(metric):
    few, many = classified(0.8, 100).report, classified(0.8, 1600).report
    narrow, wide = interval(many, metric), interval(few, metric)
    assert narrow.low < many.metrics[metric] < narrow.high
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.25)


def test_interval_of_accuracy_is_that_of_the_binomial():
    report = classified(0.8, 1000).report
    share = report.metrics["accuracy"]
    half = 1.96 * (share * (1 - share) / 1000) ** 0.5
    assert interval(report, "accuracy") == pytest.approx((share - half, share + half), abs=0.004)


def test_interval_of_a_chat_draws_rows_with_their_tokens():
    """Two rows of equal loss a token: every draw has the same loss, whatever rows it holds."""
    report = chat(1.0).report
    assert interval(report, "loss") == pytest.approx((0.5, 0.5))
    assert interval(report, "perplexity") == pytest.approx((np.exp(0.5), np.exp(0.5)))
    assert interval(report, "token_accuracy") == pytest.approx((0.5, 1.0))


def test_interval_is_absent_where_no_figure_of_a_row_makes_the_metric():
    assert interval(chat(1.0).report, "chrf") is None
    assert interval(EvaluationReport("chat", {"loss": 1.0}, 9, ()), "loss") is None
    assert interval(classified(1.0, rows=1).report, "accuracy") is None


def test_paired_difference_of_an_adapter_to_itself_is_nothing_however_few_the_rows():
    report = classified(0.7, 20).report
    assert paired_difference(report, report, "macro_f1") == (0.0, 0.0)


def test_paired_difference_is_narrower_than_of_rows_drawn_apart():
    """The better adapter errs on a part of the rows on which the other errs."""
    ours, theirs = classified(0.8, 300), classified(0.75, 300)
    paired = paired_difference(ours.report, theirs.report, "accuracy")
    alone = interval(ours.report, "accuracy")
    assert paired.low > 0
    assert paired.high - paired.low < alone.high - alone.low


def test_paired_difference_of_other_rows_is_absent():
    assert paired_difference(classified(0.8, 30).report, classified(0.8, 40).report, "accuracy") is None


# ---- verdicts -------------------------------------------------------------------------------------------


def test_non_inferiority_is_judged_by_the_bad_end_of_the_interval_not_by_the_score():
    ours, champion = classified(0.79, 120, seed=1), classified(0.79, 120, seed=2)
    assert verdict(ours, champion, champion_margin={KEY: 0.05}).passed
    refused = verdict(ours, champion, non_inferiority={KEY: 0.05})
    assert not refused.passed
    assert "bad end of the 95% interval" in refused.words
    assert verdict(ours, champion, non_inferiority={KEY: 0.25}).passed


def test_non_inferiority_where_lower_is_better_looks_at_the_other_end():
    assert verdict(chat(1.0), chat(1.2), non_inferiority={"support.perplexity": 0.0}).passed
    refused = verdict(chat(1.2), chat(1.0), non_inferiority={"support.perplexity": 0.1})
    assert not refused.passed
    assert "short by 0.07" in refused.words  # e^0.6 - e^0.5 - 0.1


def test_non_inferiority_without_a_champion_passes_and_without_rows_does_not():
    assert verdict(classified(0.8), None, non_inferiority={KEY: 0.0}).passed
    bare = EvaluationReport("classification", {"macro_f1": 0.9}, 400, ())
    old = Scores("sentiment", "tickets/test.jsonl", "d" * 64, bare)
    assert "row by row" in verdict(classified(0.8), old, non_inferiority={KEY: 0.5}).words


@pytest.mark.parametrize("block", ["champion_margin", "non_inferiority"])
def test_comparison_with_a_champion_scored_on_other_rows_is_refused(block):
    champion = classified(0.1, digest="e" * 64)
    refused = verdict(classified(0.9), champion, **{block: {KEY: 0.5}})
    assert not refused.passed
    assert "other rows (eeeeeeeeeeee, not dddddddddddd)" in refused.words
    assert verdict(classified(0.9), champion, gates={KEY: ">= 0.5"}).passed


def test_worst_task_is_the_one_that_keeps_least_of_its_parent():
    fused = [classified(0.9), chat(1.0), chat(2.0, "returns")]
    parents = {KEY: fused[0].report.metrics["macro_f1"], "support.perplexity": 1.5, "returns.perplexity": 1.5}
    evidence = Evidence(fused, parents, None, SOUND)
    refused = judge([Conditions(worst_task=">= 0.6")], evidence)
    assert not refused.passed
    assert "returns.perplexity, which keeps 0.5518" in refused.words
    assert judge([Conditions(worst_task=">= 0.55")], evidence).passed


def test_conditions_of_recipe_and_name_must_all_hold():
    ours = Evidence([classified(0.9)], {}, None, SOUND)
    recipe, name = Conditions(gates={KEY: ">= 0.5"}), Conditions(gates={KEY: ">= 0.99"})
    assert judge([recipe], ours).passed
    assert not judge([recipe, name], ours).passed


# ---- conditions of a name -------------------------------------------------------------------------------


def test_conditions_are_read_as_they_are_written():
    value = {
        "gates": {KEY: ">= 0.8"},
        "non_inferiority": {KEY: 0.01},
        "retention": {KEY: ">= 0.9"},
        "worst_task": ">= 0.5",
        "structure": ["vllm", "shapes"],
    }
    assert as_json(read_conditions(value, "gates.yaml")) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"gate": {}}, "blocks gates, champion_margin"),
        ({"gates": ["x"]}, "gates maps"),
        ({"gates": {"macro_f1": ">= 0.8"}}, "names no task"),
        ({"gates": {KEY: "<= 0.8"}}, "guards nothing"),
        ({"gates": {"sentiment.f1": ">= 0.8"}}, "'sentiment.f1' is not measured"),
        ({"non_inferiority": {KEY: -1}}, "number of 0 or more"),
        ({"champion_margin": {"sentiment.f1": 0.1}}, "not a metric"),
        ({"worst_task": "<= 0.5"}, "floor"),
        ({"structure": "vllm"}, "lists checks"),
        ({"structure": ["vlm"]}, "did you mean 'vllm'?"),
        ([], "blocks"),
    ],
)
def test_conditions_that_make_no_sense_are_refused_in_words(value, words):
    with pytest.raises(BadInput, match=r"^gates\.yaml: ") as refused:
        read_conditions(value, "gates.yaml")
    assert words in str(refused.value)
