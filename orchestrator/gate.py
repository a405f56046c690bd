"""Gates: measured conditions a version must meet to be promoted. Pure.

Owns the one table of metrics (which way is better, which task has it) and the words of a verdict.
Must not know where scores come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from workers.types import TASK_TYPES, TaskType

# ---- the table of metrics -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation report."""

    words: str
    tasks: tuple[TaskType, ...]
    lower_is_better: bool = False


METRICS: dict[str, Metric] = {
    "loss": Metric("mean loss per target token, in nats", TASK_TYPES, lower_is_better=True),
    "perplexity": Metric("exp(loss)", ("chat",), lower_is_better=True),
    "token_accuracy": Metric("share of target tokens predicted", ("chat",)),
    "rouge_l": Metric("ROUGE-L F1 of greedy replies, 0 to 1", ("chat",)),
    "chrf": Metric("chrF of greedy replies, 0 to 100", ("chat",)),
    "accuracy": Metric("share of rows labelled right", ("classification",)),
    "macro_f1": Metric("F1 averaged over labels", ("classification",)),
    "hit_at_1": Metric("share of rows whose target ranks first", ("recommendation",)),
    "ndcg_at_5": Metric("NDCG of the first five", ("recommendation",)),
    "mrr": Metric("mean reciprocal rank of the target", ("recommendation",)),
}
OF_REPLIES = frozenset({"rouge_l", "chrf"})
"""Measured on generated replies, so only where some are generated."""
OF_THE_CORPUS = frozenset({"chrf"})
"""Not made of figures of single rows, so no interval over rows is known."""


def metrics_of(task_type: TaskType) -> tuple[str, ...]:
    """Names of the metrics a task type is scored by."""
    return tuple(name for name, metric in METRICS.items() if task_type in metric.tasks)


def lower_is_better(key: str) -> bool:
    """Whether less is better for `metric` or `<task>.<metric>`. Raises KeyError for an unknown metric."""
    return METRICS[metric_name(key)].lower_is_better


def metric_name(key: str) -> str:
    """`macro_f1` of `finance-sentiment.macro_f1`; a bare name is itself."""
    return key.rpartition(".")[2]


# ---- bounds ---------------------------------------------------------------------------------------------

_BOUND = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Bound:
    """`>= 0.8` and its like."""

    operator: str
    value: float

    def holds(self, found: float) -> bool:
        """False for NaN, whatever the operator."""
        match self.operator:
            case ">=":
                return found >= self.value
            case "<=":
                return found <= self.value
            case ">":
                return found > self.value
            case _:
                return found < self.value

    def short_by(self, found: float) -> float:
        """How far `found` is on the wrong side; 0.0 when the bound holds, NaN for NaN."""
        if self.holds(found):
            return 0.0
        return abs(self.value - found)

    @property
    def is_floor(self) -> bool:
        return self.operator.startswith(">")

    def __str__(self) -> str:
        return f"{self.operator} {repr(self.value).removesuffix('.0')}"


def parse_bound(text: str) -> Bound:
    """`">= 0.8"` -> Bound. Raises ValueError in words for anything else."""
    match = _BOUND.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a bound; write an operator and a number, like '>= 0.8'")
    return Bound(match[1], float(match[2]))


# ---- the verdict ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One condition and what was measured."""

    metric: str
    required: str
    found: float | None
    """The score, or for retention the ratio; None when it was not measured."""
    short_by: float
    """Distance to the bound in the units of `found`; 0.0 when it passed, NaN when it cannot be told."""
    passed: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    passed: bool
    findings: tuple[Finding, ...]

    @property
    def words(self) -> str:
        """One line: every condition that failed, or that all passed."""
        failed = [finding.words for finding in self.findings if not finding.passed]
        return "; ".join(failed) if failed else f"all {len(self.findings)} gates passed"


def check(
    gates: Mapping[str, str],
    champion_margins: Mapping[str, float],
    retention: Mapping[str, str],
    scores: Mapping[str, float],
    parent_scores: Mapping[str, float],
    champion_scores: Mapping[str, float] | None,
) -> Verdict:
    """Judge one version's scores; keys are `metric`, or `<task>.<metric>` for a fused adapter.

    `champion_scores` is None when there is no champion: then every margin passes. `retention` compares with
    the parent of the same task: score/parent, or parent/score where lower is better.
    """
    findings = (
        *_absolute(gates, scores),
        *_against_champion(champion_margins, scores, champion_scores),
        *_retained(retention, scores, parent_scores),
    )
    return Verdict(all(finding.passed for finding in findings), findings)


def _absolute(gates: Mapping[str, str], scores: Mapping[str, float]) -> Iterator[Finding]:
    for key, text in gates.items():
        bound = parse_bound(text)
        yield _judge(key, str(bound), bound, scores.get(key), scores, "")


def _against_champion(
    margins: Mapping[str, float], scores: Mapping[str, float], champion: Mapping[str, float] | None
) -> Iterator[Finding]:
    for key, margin in margins.items():
        required = f"no worse than the champion by more than {margin:g}"
        if champion is None:
            words = f"{key}: there is no champion to compare with"
            yield Finding(key, required, scores.get(key), 0.0, True, words)
            continue
        if key not in champion:
            yield _missing(key, required, champion, "the champion")
            continue
        worse = lower_is_better(key)
        bound = Bound("<=", champion[key] + margin) if worse else Bound(">=", champion[key] - margin)
        yield _judge(key, required, bound, scores.get(key), scores, f" (champion {champion[key]:.4g})")


def _retained(
    retention: Mapping[str, str], scores: Mapping[str, float], parents: Mapping[str, float]
) -> Iterator[Finding]:
    for key, text in retention.items():
        bound = parse_bound(text)
        required = f"{bound} of its parent"
        if key not in parents:
            yield _missing(key, required, parents, "the parent")
            continue
        found = retained(key, scores[key], parents[key]) if key in scores else None
        words = f" of its parent's {parents[key]:.4g}"
        yield _judge(key, required, bound, found, scores, words)


def retained(key: str, score: float, parent: float) -> float:
    """How much of a parent's score is kept: score/parent, or parent/score where lower is better.

    A parent with nothing to keep gives 1.0 if that is matched and infinity if it is beaten.
    """
    numerator, denominator = (parent, score) if lower_is_better(key) else (score, parent)
    if denominator == 0:
        return 1.0 if numerator == 0 else math.inf
    return numerator / denominator


def _judge(
    key: str, required: str, bound: Bound, found: float | None, scores: Mapping[str, float], beside: str
) -> Finding:
    if found is None:
        return _missing(key, required, scores, "the evaluation")
    if math.isnan(found):
        return Finding(key, required, found, math.nan, False, f"{key} is not a number; required {required}")
    short = bound.short_by(found)
    passed = bound.holds(found)
    words = f"{key} is {found:.4g}{beside}, required {required}"
    return Finding(key, required, found, short, passed, words if passed else f"{words}: short by {short:.4g}")


def _missing(key: str, required: str, available: Iterable[str], whose: str) -> Finding:
    names = ", ".join(sorted(available)) or "nothing"
    words = f"{key} is required to be {required}, but {whose} has no {key}; it has {names}"
    return Finding(key, required, None, math.nan, False, words)


def gate_problem(key: str, text: str, allowed: Iterable[str]) -> str | None:
    """Why `key: text` cannot be a gate, in words, or None. `allowed` are the keys that can be measured."""
    problem = unknown_metric(key, allowed)
    if problem is not None:
        return problem
    if parse_bound(text).is_floor == lower_is_better(key):
        better = "lower" if lower_is_better(key) else "higher"
        return f"{key} is better when {better}, so {text!r} guards nothing"
    return None


def retention_problem(key: str, text: str, allowed: Iterable[str]) -> str | None:
    """Why `key: text` cannot be asked of a retention, in words, or None. More is always better here."""
    problem = unknown_metric(key, allowed)
    if problem is None and not parse_bound(text).is_floor:
        return f"more retention is better, so {text!r} guards nothing"
    return problem


def unknown_metric(key: str, allowed: Iterable[str]) -> str | None:
    """Why `key` cannot be measured, naming the nearest that can, or None."""
    names = sorted(allowed)
    if key in names:
        return None
    near = [name for name in names if name.endswith(f".{key}")] or get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}" if near else f"it has {', '.join(names)}"
    return f"{key!r} is not measured here; {hint}"
