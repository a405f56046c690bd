"""Rows that an adapter got right and wrong, as a card shows them. Pure.

Of the wrong answers of a classification and a ranking, the most confident come first: they tell most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orchestrator.contracts import Scores
from workers.types import EvaluationReport

SHOWN = 3
LONGEST = 240
"""Characters of one text; a card is read, not searched."""


class Example(NamedTuple):
    right: bool
    asked: str
    wanted: str
    answered: str
    surprise: float
    """How wrong a wrong answer is; larger is worse."""


def examples(score: Scores) -> tuple[list[Example], list[Example]]:
    """At most three right and three wrong answers; none where rows were not kept."""
    found = _read(score.report)
    right = [example for example in found if example.right]
    wrong = sorted((e for e in found if not e.right), key=lambda example: -example.surprise)
    return right[:SHOWN], wrong[:SHOWN]


def example_section(scores: Sequence[Scores]) -> str:
    """The section of a card; empty if no row was kept."""
    blocks = [_block(score) for score in scores]
    return "\n\n".join(["## Examples", *filter(None, blocks)]) if any(blocks) else ""


def _block(score: Scores) -> str:
    right, wrong = examples(score)
    if not right and not wrong:
        return ""
    lines = ["| | asked | wanted | answered |", "| --- | --- | --- | --- |"]
    lines += [_line(example) for example in (*right, *wrong)]
    return f"From the rows of {score.task} that it was scored on:\n\n" + "\n".join(lines)


def _line(example: Example) -> str:
    cells = (example.asked, example.wanted, example.answered)
    return f"| {'right' if example.right else 'wrong'} | " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """On one line and without Markdown's or HTML's meaning: the text is a stranger's."""
    short = text if len(text) <= LONGEST else "... " + text[-LONGEST:]
    flat = " ".join(short.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return f"`{flat}`" if "`" not in flat else flat.replace("`", "\\`")


def _read(report: EvaluationReport) -> list[Example]:
    match report.task_type:
        case "classification":
            return [_labelled(row) for row in report.predictions if "predicted" in row and "text" in row]
        case "recommendation":
            return [_ranked(row) for row in report.predictions if "predicted" in row and "prompt" in row]
        case "chat":
            likeness = report.row_scores.get("rouge_l", ())
            return [_replied(row, f1) for row, f1 in zip(report.predictions, likeness, strict=False)]


def _labelled(row: Mapping[str, Any]) -> Example:
    share = float(row.get("probabilities", {}).get(row["predicted"], 0.0))
    answered = f"{row['predicted']} ({share:.0%})"
    return Example(row["predicted"] == row["label"], row["text"], row["label"], answered, share)


def _ranked(row: Mapping[str, Any]) -> Example:
    answered = f"{row['predicted']}; the wanted one is number {row['rank']}"
    right = row["rank"] == 1
    return Example(right, row["prompt"], row["target"], row["predicted"] if right else answered, row["rank"])


def _replied(row: Mapping[str, Any], rouge_l: float) -> Example:
    """A reply is called right where it shares half of its words, in order, with the reference."""
    answered = f"{row['reply']} (ROUGE-L {rouge_l:.2f})"
    return Example(rouge_l >= 0.5, row["prompt"], row["reference"], answered, -rouge_l)
