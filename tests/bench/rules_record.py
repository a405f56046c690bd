"""The table of `tests.bench.rules`: which rule is best on validation rows, and what it keeps on test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.gate import retained
from tests.bench.record import Bars, Outcome, Table, Target

FLOOR = 0.95
"""Of each parent's test score, as the issue asks."""
EQUAL = "cat, weights 1"
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One adapter's headline scores, `<task>.<metric>` -> value."""

    name: str
    validation: Scores
    test: Scores
    control: bool = False
    weights: str = ""
    """Those that a search has found."""

    @property
    def words(self) -> str:
        return f"{self.name} ({self.weights})" if self.weights else self.name


@dataclass(frozen=True)
class Parents:
    """Each parent's own score on its task."""

    validation: Scores
    test: Scores

    def least(self, row: Row) -> float:
        """The least share kept on validation rows."""
        return min(kept(row.validation, self.validation).values())


def kept(scores: Scores, parents: Scores) -> Scores:
    return {key: retained(key, scores[key], parents[key]) for key in parents}


def outcome(found: Sequence[Row], keys: Mapping[str, str], searches: str) -> Outcome:
    """`keys`: name of a parent's row -> its key. `searches` says how weights were searched."""
    of = {row.name: row for row in found}
    parents = Parents(
        {key: of[name].validation[key] for name, key in keys.items()},
        {key: of[name].test[key] for name, key in keys.items()},
    )
    best = max((row for row in found if not row.control), key=parents.least)
    single = max((of[name] for name in keys), key=parents.least)
    lines = [_line(row, row is best, parents) for row in found]
    header = ("adapter", *parents.test, "least kept", "least kept, validation")
    least = {row.name: max(0.0, min(kept(row.test, parents.test).values())) for row in found}
    notes = (
        "In brackets what is kept of the score of that task's parent: score/parent, or parent/score for "
        f"perplexity. The bold row was chosen by its least kept share on validation rows. {searches} Best "
        f"single parent over all tasks: {single.name}. `joint` is the student's training from the labels "
        "alone and from a fresh adapter, with the student's rows, steps and rate. `random` has the student's "
        "norm in every module.",
    )
    return Outcome(
        "rules",
        "Fusion rules on the demo's three adapters",
        [Table("Test rows, headline metric of each task", header, lines)],
        _targets(best, of[EQUAL], parents),
        Bars(least, "least share kept of a parent's score"),
        notes,
    )


def _line(row: Row, best: bool, parents: Parents) -> list[str]:
    shares = kept(row.test, parents.test)
    return [
        f"**{row.words}**" if best else row.words,
        *(f"{row.test[key]:.4g} ({share:.0%})" for key, share in shares.items()),
        f"{min(shares.values()):.0%}",
        f"{parents.least(row):.0%}",
    ]


def _targets(best: Row, equal: Row, parents: Parents) -> list[Target]:
    keeps = kept(best.test, parents.test)
    beats = kept(best.test, equal.test)
    return [
        *(Target(f"{best.name}: {key} kept", value, FLOOR) for key, value in keeps.items()),
        *(Target(f"{key}: {best.name} over {equal.name}", value, 1.0) for key, value in beats.items()),
    ]
