"""Is a version good enough: its scores, its parents' and the champion's, against all conditions. Pure.

`gate` judges figures, `structure` files; this file knows that figures come from rows. A comparison with the
champion holds only on the same rows, by digest, and non-inferiority is judged by the whole interval of the
paired difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator import structure
from orchestrator.bootstrap import CONFIDENCE, Interval, paired_difference
from orchestrator.contracts import Scores
from orchestrator.gate import (
    METRICS,
    Finding,
    Verdict,
    check,
    gate_problem,
    lower_is_better,
    metric_name,
    parse_bound,
    retained,
    retention_problem,
)
from orchestrator.structure import Structure, unknown_check, wanted
from workers.types import BadInput

HEADLINES = {"chat": "perplexity", "classification": "macro_f1", "recommendation": "hit_at_1"}
"""The one metric by which a task is called better or worse."""


@dataclass(frozen=True)
class Conditions:
    """What must hold; keys are `<task>.<metric>`."""

    gates: Mapping[str, str] = field(default_factory=dict[str, str])
    champion_margin: Mapping[str, float] = field(default_factory=dict[str, float])
    """Score -> how much worse than the champion's it may be."""
    non_inferiority: Mapping[str, float] = field(default_factory=dict[str, float])
    """Score -> how much worse than the champion's it may be at the bad end of the difference's interval."""
    retention: Mapping[str, str] = field(default_factory=dict[str, str])
    worst_task: str | None = None
    """Bound on the least retention over all parents' tasks, each by its headline metric."""
    structure: tuple[str, ...] = ()
    """Checks of the files (`structure.CHECKS`), beside those that always hold."""


@dataclass(frozen=True)
class Evidence:
    """What was measured."""

    scores: Sequence[Scores]
    parents: Mapping[str, float]
    """`<task>.<metric>` of each parent on its own task."""
    champion: Sequence[Scores] | None
    """None when there is no champion: then every comparison with it passes."""
    structure: Structure
    """Of the version's files."""
    fused: bool = False


def judge(conditions: Sequence[Conditions], evidence: Evidence) -> Verdict:
    """The verdict on one version by all conditions together: its recipe's, and its registered name's."""
    checks = wanted([check for asked in conditions for check in asked.structure], evidence.fused)
    findings = [finding for asked in conditions for finding in _findings(asked, evidence)]
    findings += structure.findings(checks, evidence.structure)
    return Verdict(all(finding.passed for finding in findings), tuple(dict.fromkeys(findings)))


def flat(scores: Sequence[Scores]) -> dict[str, float]:
    """`<task>.<metric>` -> value."""
    return {f"{s.task}.{metric}": value for s in scores for metric, value in s.report.metrics.items()}


def _findings(asked: Conditions, evidence: Evidence) -> Iterator[Finding]:
    scores, champion = flat(evidence.scores), evidence.champion
    theirs = None if champion is None else flat(champion)
    yield from check(
        asked.gates, asked.champion_margin, asked.retention, scores, evidence.parents, theirs
    ).findings
    compared = {key.rpartition(".")[0] for key in (*asked.champion_margin, *asked.non_inferiority)}
    for task in sorted(compared if champion is not None else ()):
        yield from _same_rows(task, evidence)
    for key, margin in asked.non_inferiority.items():
        yield _non_inferior(key, margin, evidence)
    if asked.worst_task is not None:
        yield _worst_task(asked.worst_task, evidence)


GATE_TAG, FINDINGS_TAG = "gate.status", "gate.findings"
"""Of a version: whether its gates passed when they were last checked, and what was found."""


def gate_tags(verdict: Verdict) -> dict[str, str]:
    found = [finding_view(finding) for finding in verdict.findings]
    return {GATE_TAG: "passed" if verdict.passed else "failed", FINDINGS_TAG: json.dumps(found)}


def finding_view(finding: Finding) -> dict[str, Any]:
    """As JSON, which has no NaN."""
    found = finding.found if finding.found is not None and math.isfinite(finding.found) else None
    return {
        "metric": finding.metric,
        "required": finding.required,
        "found": found,
        "passed": finding.passed,
        "words": finding.words,
    }


# ---- against the champion -------------------------------------------------------------------------------


def _same_rows(task: str, evidence: Evidence) -> Iterator[Finding]:
    """A failed finding where the champion's score of a task rests on other rows; nothing where it agrees."""
    ours, theirs = _of_task(evidence.scores, task), _of_task(evidence.champion or (), task)
    if ours is None or theirs is None or ours.dataset_digest == theirs.dataset_digest:
        return
    words = (
        f"{task}: the champion was scored on other rows ({theirs.dataset_digest[:12]}, not "
        f"{ours.dataset_digest[:12]}), so the two cannot be compared; score both on the same rows"
    )
    yield Finding(task, "scored on the champion's rows", None, math.nan, False, words)


def _non_inferior(key: str, margin: float, evidence: Evidence) -> Finding:
    required = f"no worse than the champion by {margin:g}, at the bad end of the {CONFIDENCE:.0%} interval"
    if evidence.champion is None:
        return Finding(key, required, None, 0.0, True, f"{key}: there is no champion to compare with")
    found = difference(key, evidence.scores, evidence.champion)
    if found is None:
        words = (
            f"{key} cannot be compared with the champion row by row; non_inferiority needs the scores of rows"
        )
        return Finding(key, required, None, math.nan, False, words)
    worst = found.high if lower_is_better(key) else -found.low
    words = f"{key} differs from the champion's by {found.low:+.4g} to {found.high:+.4g}, required {required}"
    short = max(0.0, worst - margin)
    tail = "" if short == 0 else f": short by {short:.4g}"
    return Finding(key, required, worst, short, short == 0, words + tail)


def difference(key: str, ours: Sequence[Scores], theirs: Sequence[Scores]) -> Interval | None:
    """Interval of our score minus theirs, on the same rows; None if those were not the same or not kept."""
    task, _, metric = key.rpartition(".")
    mine, other = _of_task(ours, task), _of_task(theirs, task)
    if mine is None or other is None or mine.dataset_digest != other.dataset_digest:
        return None
    return paired_difference(mine.report, other.report, metric)


def _of_task(scores: Sequence[Scores], task: str) -> Scores | None:
    return next((score for score in scores if score.task == task), None)


# ---- against the parents --------------------------------------------------------------------------------


def _worst_task(text: str, evidence: Evidence) -> Finding:
    bound = parse_bound(text)
    required = f"at least {bound} of the parent's on the worst task"
    scores = flat(evidence.scores)
    headlines = [f"{score.task}.{HEADLINES[score.report.task_type]}" for score in evidence.scores]
    kept = {
        key: retained(metric_name(key), scores[key], evidence.parents[key])
        for key in headlines
        if key in scores and key in evidence.parents
    }
    if not kept:
        words = "worst_task cannot be judged: no task has both a score and a parent's"
        return Finding("worst_task", required, None, math.nan, False, words)
    key = min(kept, key=kept.__getitem__)
    short = bound.short_by(kept[key])
    words = f"the worst task is {key}, which keeps {kept[key]:.4g} of its parent's, required {bound}"
    tail = "" if bound.holds(kept[key]) else f": short by {short:.4g}"
    return Finding("worst_task", required, kept[key], short, bound.holds(kept[key]), words + tail)


# ---- as a registered name keeps them --------------------------------------------------------------------

BLOCKS = ("gates", "champion_margin", "non_inferiority", "retention", "worst_task", "structure")


def read_conditions(value: Any, where: str) -> Conditions:
    """Conditions of a mapping, as YAML or JSON gives it. Raises BadInput naming the key."""
    if not isinstance(value, dict) or set(value) - set(BLOCKS):  # pyright: ignore[reportUnknownArgumentType]
        raise BadInput(f"{where}: it may hold the blocks {', '.join(BLOCKS)} and nothing else")
    blocks = cast("dict[str, Any]", value)
    for name in BLOCKS[:4]:
        if not isinstance(blocks.get(name, {}), dict):
            raise BadInput(f"{where}: {name} maps a <task>.<metric> to a bound or a margin")
        for key, bound in blocks.get(name, {}).items():
            _check(where, name, str(key), bound)
    worst = blocks.get("worst_task")
    if worst is not None:
        _check(where, "worst_task", "worst_task", worst)
    given: dict[str, Any] = {name: blocks[name] for name in BLOCKS if blocks.get(name)}
    given["structure"] = _checks(where, blocks.get("structure") or [])
    return Conditions(**given)


def _checks(where: str, listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list):
        raise BadInput(f"{where}: structure lists checks, like [vllm, shapes]")
    for name in cast("list[Any]", listed):
        if problem := unknown_check(name):
            raise BadInput(f"{where}: structure: {problem}")
    return tuple(cast("list[str]", listed))


def _check(where: str, block: str, key: str, bound: Any) -> None:
    allowed = [f"{key.rpartition('.')[0]}.{metric}" for metric in METRICS]
    try:
        if block == "worst_task":
            problem = None if parse_bound(str(bound)).is_floor else "more is better, so it must be a floor"
        elif "." not in key:
            problem = f"{key!r} names no task; write <task>.<metric>"
        elif block in ("champion_margin", "non_inferiority"):
            number = isinstance(bound, int | float) and not isinstance(bound, bool) and bound >= 0
            problem = None if number else f"{key}: {bound!r} is not a margin; write a number of 0 or more"
            problem = problem or (None if key in allowed else f"{key!r} is not a metric")
        elif block == "gates":
            problem = gate_problem(key, str(bound), allowed)
        else:
            problem = retention_problem(key, str(bound), allowed)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise BadInput(f"{where}: {block}: {problem}")


def as_json(conditions: Conditions) -> dict[str, Any]:
    """The inverse of `read_conditions`."""
    found: dict[str, Any] = {name: getattr(conditions, name) for name in BLOCKS[:4]}
    found = {name: dict(value) for name, value in found.items()}
    found |= {"worst_task": conditions.worst_task, "structure": list(conditions.structure)}
    return {name: value for name, value in found.items() if value}
