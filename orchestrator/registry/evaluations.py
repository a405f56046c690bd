"""A version's evaluation as files: what was measured in `eval/report.json`, of each row in `eval/rows.json`.

Owns both forms, written and read. Imports no mlflow: the registry in memory keeps the same files.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.bootstrap import interval
from orchestrator.contracts import AdapterVersion, NoSuchVersion, Registry, Scores
from workers.types import EvaluationReport

REPORT, ROWS = "eval/report.json", "eval/rows.json"
CONTROLS = ("base", "random", "best_parent", "joint")
"""What a fusion may be compared with, in the order in which it is shown; parents stand between."""


def documents(
    scores: Sequence[Scores],
    base_scores: Sequence[Scores],
    controls: Mapping[str, Sequence[Scores]] | None = None,
) -> dict[str, str]:
    """Path in the version -> text."""
    sets = {"scores": scores, "base_scores": base_scores}
    report: dict[str, Any] = {name: [as_json(score) for score in found] for name, found in sets.items()}
    report["controls"] = {
        name: [as_json(score) for score in found] for name, found in (controls or {}).items()
    }
    rows = {
        name: {
            score.task: {key: list(values) for key, values in score.report.row_scores.items()}
            for score in found
        }
        for name, found in sets.items()
    }
    return {REPORT: json.dumps(report, indent=2) + "\n", ROWS: json.dumps(rows) + "\n"}


def as_json(score: Scores) -> dict[str, Any]:
    """One task's evaluation as JSON, without its rows; `intervals` are of 95%, where the rows give one."""
    report = score.report
    found = {key: interval(report, key) for key in report.metrics}
    return {
        "task": score.task,
        "task_type": report.task_type,
        "dataset": score.dataset,
        "dataset_sha256": score.dataset_digest,
        "rows": report.rows,
        "metrics": {key: json_value(value) for key, value in report.metrics.items()},
        "intervals": {key: [json_value(end) for end in ends] for key, ends in found.items() if ends},
        "labels": list(report.labels),
        "confusion": [list(row) for row in report.confusion],
    }


def json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_scores(registry: Registry, version: AdapterVersion, which: str = "scores") -> tuple[Scores, ...]:
    """A version's own scores (or its `base_scores`) with their rows, verified; without predictions.

    A version from before rows were kept has none. Raises NoSuchVersion without a report.
    """
    report = json.loads(registry.read_text(version, REPORT))
    rows: dict[str, Any] = {}
    with contextlib.suppress(NoSuchVersion):
        rows = json.loads(registry.read_text(version, ROWS))
    return tuple(_read(entry, rows.get(which, {}).get(entry["task"], {})) for entry in report[which])


def read_controls(registry: Registry, version: AdapterVersion) -> dict[str, tuple[Scores, ...]]:
    """What a fused version was measured beside, by name, without rows; its parents as `name/version`."""
    report = json.loads(registry.read_text(version, REPORT))
    return {name: tuple(_read(e, {}) for e in found) for name, found in report.get("controls", {}).items()}


def _read(entry: Mapping[str, Any], rows: Mapping[str, Sequence[float]]) -> Scores:
    report = EvaluationReport(
        task_type=entry["task_type"],
        metrics={key: float(value) for key, value in entry["metrics"].items()},
        rows=entry["rows"],
        predictions=(),
        labels=tuple(entry["labels"]),
        confusion=tuple(tuple(row) for row in entry["confusion"]),
        row_scores={key: tuple(values) for key, values in rows.items()},
    )
    return Scores(entry["task"], entry["dataset"], entry["dataset_sha256"], report)
