"""Which versions `adapters list` shows: by task, base, metric, alias and parent. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.commands.recheck import parents_of, scores_of
from orchestrator.contracts import AdapterVersion
from orchestrator.gate import METRICS, parse_bound, unknown_metric
from workers.types import BadInput

_CONDITION = re.compile(r"\s*(?P<key>[\w@.-]+?)\s*(?P<bound>[<>]=?.*)")


@dataclass(frozen=True)
class Filters:
    """None and empty let everything through; all that is given must hold."""

    name: str | None = None
    task: str | None = None
    base: str | None = None
    """Its name, the end of it, or the beginning of its digest."""
    alias: str | None = None
    parent: str | None = None
    """NAME or NAME/VERSION."""
    metrics: tuple[str, ...] = ()
    """Like `macro_f1 >= 0.8`, or `<task>.<metric>` for one task of several."""


def chosen(versions: Sequence[AdapterVersion], filters: Filters) -> list[AdapterVersion]:
    """Raises BadInput for a metric or a bound that does not exist."""
    bounds = [_condition(text) for text in filters.metrics]
    return [
        version
        for version in versions
        if filters.task in (None, version.tags.get("task"), *_tasks(version))
        and _of_base(version, filters.base)
        and (filters.alias is None or filters.alias in version.aliases)
        and _of_parent(version, filters.parent)
        and all(_meets(version, key, bound) for key, bound in bounds)
    ]


def _tasks(version: AdapterVersion) -> set[str]:
    """A fusion has the tasks that it was scored on."""
    return {key.rpartition(".")[0] for key in scores_of(version)}


def _of_base(version: AdapterVersion, base: str | None) -> bool:
    if base is None:
        return True
    name, digest = version.tags.get("base.name", ""), version.tags.get("base.digest", "")
    return name == base or name.endswith(f"/{base}") or (len(base) >= 6 and digest.startswith(base))


def _of_parent(version: AdapterVersion, parent: str | None) -> bool:
    parents = parents_of(version)
    return parent is None or any(parent in (entry, entry.rpartition("/")[0]) for entry in parents)


def _condition(text: str) -> tuple[str, str]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise BadInput(f"--metric {text!r}: write a metric, an operator and a number, like 'macro_f1 >= 0.8'")
    try:
        parse_bound(match["bound"])
    except ValueError as error:
        raise BadInput(f"--metric {text!r}: {error}") from error
    if problem := unknown_metric(match["key"].rpartition(".")[2], METRICS):
        raise BadInput(f"--metric {text!r}: {problem}")
    return match["key"], match["bound"]


def _meets(version: AdapterVersion, key: str, bound: str) -> bool:
    """Whether any of the version's scores of that name is within the bound."""
    found = [v for k, v in scores_of(version).items() if key in (k, k.rpartition(".")[2])]
    return any(parse_bound(bound).holds(value) for value in found)
