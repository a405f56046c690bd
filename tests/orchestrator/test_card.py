"""The model card: intervals beside base and champion, controls, examples, limits, metadata a hub reads."""

from __future__ import annotations

from dataclasses import replace

import yaml
from huggingface_hub import ModelCard

from orchestrator.contracts import Scores
from orchestrator.gate import Finding
from orchestrator.registry.card import card
from tests.orchestrator.test_judgement import chat, classified
from workers.types import EvaluationReport


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n## ")[0]


def row(text: str, *begin: str) -> list[str]:
    """The cells of the one table row that begins so."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    (found,) = (cells for cells in rows if tuple(cells[: len(begin)]) == begin)
    return found


def test_card_gives_every_score_its_interval_and_the_paired_difference_to_base_and_champion():
    ours, base, champion = classified(0.9), classified(0.3, seed=1), classified(0.85)
    text = card(
        name="tiny.x", base_model="tiny", scores=[ours], base_scores=[base], champion=("tiny.x/3", [champion])
    )
    cells = row(section(text, "Scores"), "sentiment", "accuracy")
    accuracy = ours.report.metrics["accuracy"]
    assert cells[3].startswith(f"{accuracy:.4g} [0.8")
    assert cells[4].startswith("[+0.")
    assert cells[5] == f"{champion.report.metrics['accuracy']:.4g}"
    low, high = (float(end) for end in cells[6].strip("[]").split(","))
    assert 0 < low < accuracy - champion.report.metrics["accuracy"] < high
    assert "400 of sentiment" in text


def test_card_does_not_subtract_scores_of_other_rows():
    ours, other = classified(0.9), classified(0.85, digest="e" * 64)
    text = card(name="tiny.x", base_model="tiny", scores=[ours], champion=("tiny.x/3", [other]))
    assert row(section(text, "Scores"), "sentiment", "accuracy")[6] == "-"


def test_card_of_a_fusion_shows_its_controls_and_what_it_keeps_of_each():
    fused = [classified(0.9), chat(1.2)]
    controls = {
        "tiny.a/1": [classified(0.95)],
        "tiny.b/1": [chat(1.0)],
        "random": [classified(0.3), chat(3.0)],
    }
    base = [classified(0.3, seed=1), chat(3.0)]
    text = card(
        name="tiny.m",
        base_model="tiny",
        scores=fused,
        base_scores=base,
        controls=controls,
        parents=["tiny.a/1", "tiny.b/1"],
        rule="cat",
    )
    found = section(text, "Controls")
    macro = f"{fused[0].report.metrics['macro_f1']:.4g}"
    assert row(found, "**this**")[1:3] == [macro, "1.822"]
    assert row(found, "tiny.b/1")[1:] == ["-", "1.649", "90%"]
    assert row(found, "tiny.a/1")[2] == "-"
    assert {row(found, name)[0] for name in ("base", "random")} == {"base", "random"}


def test_card_shows_right_answers_and_the_most_confident_wrong_ones():
    predictions = tuple(
        {
            "text": f"row {n}",
            "label": "positive",
            "predicted": "negative" if n % 2 else "positive",
            "probabilities": {"negative": 0.5 + n / 100, "positive": 0.5 - n / 100},
        }
        for n in range(10)
    )
    score = classified(0.5)
    score = replace(score, report=replace(score.report, predictions=predictions))
    found = section(card(name="tiny.x", base_model="tiny", scores=[score]), "Examples")
    wrong = [line for line in found.splitlines() if line.startswith("| wrong")]
    assert [n in line for line, n in zip(wrong, ("row 9", "row 7", "row 5"), strict=True)] == [True] * 3
    assert "negative (59%)" in wrong[0]
    assert sum(line.startswith("| right") for line in found.splitlines()) == 3


def test_card_keeps_a_strangers_text_on_one_line_and_without_markup():
    row_ = {"prompt": "user: a | b\n# head <script>", "reference": "yes", "reply": "no `code`"}
    report = EvaluationReport("chat", {"loss": 1.0}, 1, (row_,), row_scores={"rouge_l": (0.0,)})
    found = section(card(name="x", base_model="b", scores=[Scores("t", "d", "c" * 64, report)]), "Examples")
    (line,) = (line for line in found.splitlines() if line.startswith("| wrong"))
    assert "a \\| b # head &lt;script>" in line
    assert "\\`code\\`" in line


def test_card_limits_name_few_rows_and_the_label_most_often_missed():
    report = EvaluationReport(
        *("classification", {"macro_f1": 0.8}, 40, (), ("bad", "good")), confusion=((5, 15), (0, 20))
    )
    text = card(name="x", base_model="b", scores=[Scores("t", "d/test.jsonl", "c" * 64, report)])
    assert "40 rows of t are few" in section(text, "Limits")
    assert "finds 'bad' least often, in 25% of its rows" in section(text, "Limits")


def test_card_shows_every_gate_as_it_was_found():
    gates = [
        Finding("sentiment.accuracy", ">= 0.8", 0.9, 0.0, True, "words"),
        Finding("structure.finite", "no NaN and no infinity", None, 0.0, False, "words"),
    ]
    text = section(card(name="tiny.x", base_model="tiny", scores=[classified(0.9)], gates=gates), "Gates")
    assert row(text, "sentiment.accuracy") == ["sentiment.accuracy", ">= 0.8", "0.9", "yes"]
    assert row(text, "structure.finite")[2:] == ["-", "**no**"]


def test_card_front_matter_is_a_model_index_with_intervals():
    text = card(name="tiny.x", base_model="org/tiny", scores=[classified(0.9)], license="apache-2.0")
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.license) == ("peft", "org/tiny", "apache-2.0")
    metadata = yaml.safe_load(text.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    macro = next(metric for metric in result["metrics"] if metric["type"] == "macro_f1")
    low, high = macro["args"]["confidence_interval_95"]
    assert low < macro["value"] < high
