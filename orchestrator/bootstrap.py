"""How sure a score is: 95% intervals of a metric, and of the difference of two adapters on one set of rows.

Pure. Percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13), by scipy. Rows are drawn, never
tokens: a row's tokens are not independent. Two adapters are drawn with the same rows, so what makes a row
hard for both cancels (paired bootstrap, Koehn 2004). Seeded: equal rows give equal intervals.
"""

# scipy has no types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from workers.types import EvaluationReport

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWN_AT_ONCE = 2_000_000
"""Rows, over all resamples of a batch: bounds memory."""


class Interval(NamedTuple):
    low: float
    high: float


def interval(report: EvaluationReport, metric: str) -> Interval | None:
    """Of one score; None where it does not follow from the rows kept (chrF), or there are fewer than two."""
    statistic = _statistic(report, metric)
    return None if statistic is None else _bootstrap(statistic, _rows(report, metric))


def paired_difference(ours: EvaluationReport, theirs: EvaluationReport, metric: str) -> Interval | None:
    """Of `ours - theirs`, both scored on the same rows in the same order; None as for `interval`."""
    mine, other = _statistic(ours, metric), _statistic(theirs, metric)
    rows = _rows(ours, metric)
    if mine is None or other is None or rows != _rows(theirs, metric):
        return None
    return _bootstrap(lambda drawn: mine(drawn) - other(drawn), rows)


def _bootstrap(statistic: Callable[[Array], Array], rows: int) -> Interval | None:
    """`statistic` takes places of rows [..., rows] and gives one figure for each draw [...]."""
    import numpy as np
    from scipy import stats

    if rows < 2:
        return None

    def of_draws(drawn: Array, axis: int = -1) -> Array:  # noqa: ARG001 (scipy asks for it; rows are last)
        return statistic(drawn)

    found: Any = stats.bootstrap(
        (np.arange(rows),),
        of_draws,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // rows),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Interval(float(low), float(high))


def _rows(report: EvaluationReport, metric: str) -> int:
    """How many rows a metric rests on: replies are made for the first few only."""
    kept = report.row_scores
    return next((len(kept[name]) for name in (metric, "nll", "truth") if name in kept), 0)


def _statistic(report: EvaluationReport, metric: str) -> Callable[[Array], Array] | None:
    """The metric as a function of drawn rows, by its definition over what is kept of each row."""
    import numpy as np

    kept: Mapping[str, Array] = {name: np.asarray(values) for name, values in report.row_scores.items()}
    if metric in kept:
        return lambda drawn: kept[metric][drawn].mean(axis=-1)
    match metric:
        case "loss" | "perplexity" if "nll" in kept:
            loss = _ratio(kept["nll"], kept["tokens"])
            return loss if metric == "loss" else lambda drawn: np.exp(np.minimum(loss(drawn), 700.0))
        case "token_accuracy" if "correct" in kept:
            return _ratio(kept["correct"], kept["tokens"])
        case "accuracy" if "truth" in kept:
            return lambda drawn: (kept["truth"][drawn] == kept["predicted"][drawn]).mean(axis=-1)
        case "macro_f1" if "truth" in kept:
            return _macro_f1(kept["truth"], kept["predicted"], len(report.labels))
        case _:
            return None


def _ratio(numerator: Array, denominator: Array) -> Callable[[Array], Array]:
    return lambda drawn: numerator[drawn].sum(axis=-1) / denominator[drawn].sum(axis=-1)


def _macro_f1(truth: Array, predicted: Array, labels: int) -> Callable[[Array], Array]:
    """F1 of a label is 2 TP / (true + predicted), 0 where that is 0/0; the mean over all labels."""
    import numpy as np

    def statistic(drawn: Array) -> Array:
        total = np.zeros(drawn.shape[:-1])
        for label in range(labels):
            true, guessed = truth[drawn] == label, predicted[drawn] == label
            both = true.sum(axis=-1) + guessed.sum(axis=-1)
            total += 2 * (true & guessed).sum(axis=-1) / np.maximum(both, 1)
        return total / labels

    return statistic
