"""Bounds, margins and retention, and the words of a verdict."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gate import METRICS, Verdict, check, lower_is_better, metrics_of, parse_bound, retained
from workers.types import TASK_TYPES

Scores = dict[str, float]


def judge(
    gates: dict[str, str] | None = None,
    margins: Scores | None = None,
    retention: dict[str, str] | None = None,
    scores: Scores | None = None,
    parents: Scores | None = None,
    champion: Scores | None = None,
) -> Verdict:
    return check(gates or {}, margins or {}, retention or {}, scores or {}, parents or {}, champion)


# ---- bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (">= 0.8", ">= 0.8"),
        ("<=12", "<= 12"),
        ("  > .5 ", "> 0.5"),
        ("< 1e2", "< 100"),
        (">=-1.25", ">= -1.25"),
    ],
)
def test_bound_is_read_and_written_in_one_form(text: str, form: str) -> None:
    assert str(parse_bound(text)) == form


@given(st.sampled_from([">=", "<=", ">", "<"]), st.floats(allow_nan=False, allow_infinity=False))
def test_bound_survives_writing_and_reading(operator: str, value: float) -> None:
    bound = parse_bound(f"{operator} {value!r}")
    assert parse_bound(str(bound)) == bound
    assert bound.value == value


@pytest.mark.parametrize("text", ["0.8", "=> 0.8", ">= ", "== 1", ">= 0.8 %", ">= nan", ""])
def test_bound_that_is_none_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="write an operator and a number"):
        parse_bound(text)


# ---- gates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "score", "passed", "short"),
    [
        (">= 0.8", 0.8, True, 0.0),
        (">= 0.8", 0.75, False, 0.05),
        ("> 0.8", 0.8, False, 0.0),
        ("> 0.8", 0.9, True, 0.0),
        ("<= 12", 12.0, True, 0.0),
        ("<= 12", 13.5, False, 1.5),
        ("< 12", 12.0, False, 0.0),
    ],
)
def test_gate_on_a_score_passes_or_says_by_how_much_it_is_short(
    bound: str, score: float, passed: bool, short: float
) -> None:
    verdict = judge(gates={"t.loss": bound}, scores={"t.loss": score})
    (finding,) = verdict.findings
    assert (verdict.passed, finding.passed, finding.found) == (passed, passed, score)
    assert finding.short_by == pytest.approx(short)


def test_gate_that_fails_says_what_was_found_required_and_missing() -> None:
    verdict = judge(gates={"fin.macro_f1": ">= 0.85"}, scores={"fin.macro_f1": 0.8123})
    assert verdict.words == "fin.macro_f1 is 0.8123, required >= 0.85: short by 0.0377"


def test_gate_on_what_was_not_measured_fails_and_names_what_was() -> None:
    verdict = judge(gates={"macro_f1": ">= 0.8"}, scores={"accuracy": 0.9, "loss": 0.1})
    (finding,) = verdict.findings
    assert not verdict.passed
    assert finding.found is None
    assert "no macro_f1; it has accuracy, loss" in finding.words


@pytest.mark.parametrize("bound", [">= 0.8", "<= 0.8"])
def test_gate_on_a_score_that_is_not_a_number_fails(bound: str) -> None:
    verdict = judge(gates={"loss": bound}, scores={"loss": math.nan})
    assert not verdict.passed
    assert "not a number" in verdict.words


def test_gates_pass_only_together() -> None:
    scores = {"macro_f1": 0.9, "loss": 0.5}
    assert judge(gates={"macro_f1": ">= 0.8", "loss": "<= 1"}, scores=scores).words == "all 2 gates passed"
    verdict = judge(gates={"macro_f1": ">= 0.8", "loss": "<= 0.4"}, scores=scores)
    assert [finding.passed for finding in verdict.findings] == [True, False]
    assert not verdict.passed


def test_gates_that_are_none_pass() -> None:
    assert judge(scores={"loss": 1.0}).passed


# ---- champion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "score", "champion", "passed", "short"),
    [
        ("macro_f1", 0.895, 0.90, True, 0.0),
        ("macro_f1", 0.88, 0.90, False, 0.01),
        ("macro_f1", 0.95, 0.90, True, 0.0),
        ("t.perplexity", 4.005, 4.0, True, 0.0),
        ("t.perplexity", 4.5, 4.0, False, 0.49),
        ("t.perplexity", 3.0, 4.0, True, 0.0),
    ],
)
def test_margin_allows_no_more_than_itself_below_the_champion(
    metric: str, score: float, champion: float, passed: bool, short: float
) -> None:
    verdict = judge(margins={metric: 0.01}, scores={metric: score}, champion={metric: champion})
    assert verdict.passed == passed
    assert verdict.findings[0].short_by == pytest.approx(short)


def test_margin_without_a_champion_passes_and_says_so() -> None:
    verdict = judge(margins={"macro_f1": 0.01}, scores={"macro_f1": 0.1}, champion=None)
    assert verdict.passed
    assert "no champion" in verdict.findings[0].words


@pytest.mark.parametrize(
    ("scores", "champion"), [({}, {"macro_f1": 0.9}), ({"macro_f1": 0.9}, {"accuracy": 0.9})]
)
def test_margin_that_cannot_be_compared_fails(scores: Scores, champion: Scores) -> None:
    assert not judge(margins={"macro_f1": 0.01}, scores=scores, champion=champion).passed


# ---- retention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "fused", "parent", "ratio"),
    [
        ("fin.macro_f1", 0.6, 0.8, 0.75),
        ("sup.perplexity", 8.0, 4.0, 0.5),
        ("sup.loss", 1.0, 2.0, 2.0),
        ("fin.macro_f1", 0.0, 0.0, 1.0),
        ("fin.macro_f1", 0.1, 0.0, math.inf),
        ("sup.loss", 0.0, 1.0, math.inf),
    ],
)
def test_retention_is_the_share_of_the_parent_kept(
    metric: str, fused: float, parent: float, ratio: float
) -> None:
    assert retained(metric, fused, parent) == pytest.approx(ratio)
    verdict = judge(retention={metric: ">= 0.6"}, scores={metric: fused}, parents={metric: parent})
    assert verdict.findings[0].found == pytest.approx(ratio)
    assert verdict.passed == (ratio >= 0.6)


@pytest.mark.parametrize(("scores", "parents"), [({}, {"loss": 1.0}), ({"loss": 1.0}, {})])
def test_retention_without_both_scores_fails(scores: Scores, parents: Scores) -> None:
    assert not judge(retention={"loss": ">= 0.6"}, scores=scores, parents=parents).passed


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.sampled_from(sorted(METRICS)))
def test_retention_of_at_least_one_means_no_worse_than_the_parent(
    fused: float, parent: float, metric: str
) -> None:
    no_worse = fused <= parent if lower_is_better(metric) else fused >= parent
    assert (retained(metric, fused, parent) >= 1) == no_worse


# ---- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_metrics_of_every_task_type_can_be_judged(task_type: str) -> None:
    names = metrics_of(task_type)  # type: ignore[arg-type]
    assert "loss" in names
    assert {name for name in names if lower_is_better(name)} <= {"loss", "perplexity"}
