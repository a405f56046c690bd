"""`adapters verify`, `lineage`, `diff`, `history`, `gates`: what a version is, came from, went through."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from orchestrator.bootstrap import Interval
from orchestrator.commands.adapters import find
from orchestrator.commands.output import Format, emit, figure, grid, moment
from orchestrator.commands.parts import Parts
from orchestrator.commands.recheck import of_name, parents_of, scores_of
from orchestrator.contracts import AdapterVersion, NoSuchVersion, Registry, ReleaseRecord
from orchestrator.home import Home
from orchestrator.judgement import as_json, difference, read_conditions
from orchestrator.registry.evaluations import read_scores
from workers.types import BadInput

DIGEST_SHOWN = 12
"""Characters of a digest in a table; all of them with `-o json`."""


def label(version: AdapterVersion) -> str:
    return f"{version.name}/{version.version}"


# ---- verify ---------------------------------------------------------------------------------------------


def verify(parts: Parts, home: Home, name: str | None, format: Format) -> int:
    """Check every stored byte, tag and alias; how many things are not as they were made.

    Raises NoSuchVersion for a name of which nothing is known, be it deleted.
    """
    with parts.registry(home) as registry:
        versions = registry.versions(name)
        problems = registry.audit(name)
    if name is not None and not versions and not problems:
        raise NoSuchVersion(f"no adapter is registered as {name}")

    def table(out: Console) -> None:
        for problem in problems:
            number = "" if problem.version is None else f"/{problem.version}"
            out.print(f"{problem.name}{number}: {problem.words}", soft_wrap=True)
        bad = f"{len(problems)} problems" if problems else "nothing was altered"
        out.print(f"{len(versions)} versions of {len({v.name for v in versions})} names checked: {bad}")

    found = [{"name": p.name, "version": p.version, "problem": p.words} for p in problems]
    emit({"versions": len(versions), "problems": found}, format, table)
    return len(problems)


# ---- lineage --------------------------------------------------------------------------------------------


def lineage(parts: Parts, home: Home, reference: str, format: Format) -> None:
    """What a version was made from, up to the data, and what was made from it."""
    with parts.registry(home) as registry:
        version = find(registry, reference)
        known = {label(other): other for other in registry.versions()}
    value = {**_node(version), "parents": _parents(version, known), "children": _children(version, known)}

    def table(out: Console) -> None:
        out.print(_line(value), soft_wrap=True)
        for title in ("parents", "children"):
            for depth, node in _walk(value[title], title):
                arrow = "from" if title == "parents" else "into"
                out.print(f"{'  ' * depth}{arrow} {_line(node)}", soft_wrap=True)

    emit(value, format, table)


def _node(version: AdapterVersion) -> dict[str, Any]:
    tags = version.tags
    return {
        "version": label(version),
        "aliases": list(version.aliases),
        "task": tags.get("task", ""),
        "base": tags.get("base.name", ""),
        "adapter.digest": version.digest,
        "recipe.digest": tags.get("recipe.digest", ""),
        "data.digest": tags.get("data.digest", ""),
        "missing": False,
    }


def _parents(version: AdapterVersion, known: Mapping[str, AdapterVersion]) -> list[dict[str, Any]]:
    names = parents_of(version)
    return [
        {**_node(known[name]), "parents": _parents(known[name], known)}
        if name in known
        else {"version": name, "missing": True, "parents": []}
        for name in names
    ]


def _children(version: AdapterVersion, known: Mapping[str, AdapterVersion]) -> list[dict[str, Any]]:
    own = label(version)
    made = [other for other in known.values() if own in parents_of(other)]
    return [{**_node(other), "children": _children(other, known)} for other in made]


def _walk(nodes: Sequence[dict[str, Any]], key: str, depth: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    for node in nodes:
        yield depth, node
        yield from _walk(node[key], key, depth + 1)


def _line(node: Mapping[str, Any]) -> str:
    if node["missing"]:
        return f"{node['version']}, which is no longer in the registry"
    aliases = f" ({', '.join(node['aliases'])})" if node["aliases"] else ""
    digests = [f"{key} {node[f'{key}.digest'][:DIGEST_SHOWN]}" for key in ("adapter", "recipe", "data")]
    return f"{node['version']}{aliases}: {node['task']} on {node['base']}; {', '.join(digests)}"


# ---- diff -----------------------------------------------------------------------------------------------


def diff(parts: Parts, home: Home, references: tuple[str, str], format: Format) -> None:
    """What two versions differ in: tags, scores with the interval of their difference, recipe."""
    with parts.registry(home) as registry:
        one, other = (find(registry, reference) for reference in references)
        recipe = _recipe_diff(registry, one, other)
        rows = _score_rows(registry, one, other)
    keys = sorted(one.tags.keys() | other.tags.keys())
    tags = {key: [one.tags.get(key), other.tags.get(key)] for key in keys}
    tags = {key: pair for key, pair in tags.items() if pair[0] != pair[1]}
    value = {"versions": [label(one), label(other)], "tags": tags, "scores": rows, "recipe": recipe}

    def table(out: Console) -> None:
        columns = ("metric", label(one), label(other), "difference (95%)")
        out.print(grid(columns, [_score_cells(key, row) for key, row in rows.items()], right=columns[1:]))
        out.print()
        out.print(
            grid(("tag", label(one), label(other)), [(k, *map(_short, pair)) for k, pair in tags.items()])
        )
        for line in recipe:
            out.print(line, soft_wrap=True)

    emit(value, format, table)


def _short(text: str | None) -> str:
    return (text or "")[:DIGEST_SHOWN] if text and len(text) == 64 else text or ""


def _recipe_diff(registry: Registry, one: AdapterVersion, other: AdapterVersion) -> list[str]:
    before, after = (registry.read_text(version, "recipe.yaml").splitlines() for version in (one, other))
    return list(difflib.unified_diff(before, after, label(one), label(other), lineterm="", n=1))


def _score_rows(registry: Registry, one: AdapterVersion, other: AdapterVersion) -> dict[str, dict[str, Any]]:
    """Metric -> both scores and the interval of `other - one`, where both were scored on the same rows."""
    mine, theirs = scores_of(one), scores_of(other)
    before, after = read_scores(registry, one), read_scores(registry, other)
    return {
        key: {
            "scores": [mine.get(key), theirs.get(key)],
            "difference": _ends(difference(key, after, before)),
        }
        for key in sorted(mine.keys() | theirs.keys())
    }


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _score_cells(key: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    ends = row["difference"]
    shown = "" if ends is None else f"{ends[0]:+.4g} to {ends[1]:+.4g}"
    return (key, *map(figure, row["scores"]), shown)


# ---- history --------------------------------------------------------------------------------------------


def history(parts: Parts, home: Home, name: str, format: Format) -> None:
    """The release record of a name. Raises NoSuchVersion for a name without versions."""
    with parts.registry(home) as registry:
        records = registry.history(name)
        if not records and not registry.versions(name):
            raise NoSuchVersion(f"no adapter is registered as {name}; `chorus adapters list` shows them")

    def table(out: Console) -> None:
        if not records:
            out.print(f"no version of {name} has been champion yet")
            return
        columns = ("no", "when", "who", "move", "from", "to", "adapter", "why")
        out.print(grid(columns, [_record_cells(record) for record in records], right=("no", "from", "to")))

    emit([_record_view(record) for record in records], format, table)


def _record_view(record: ReleaseRecord) -> dict[str, Any]:
    return {
        "number": record.number,
        "name": record.name,
        "kind": record.kind,
        "from": record.source or None,
        "to": record.target,
        "who": record.who,
        "at": record.when_ms / 1000,
        "reason": record.reason,
        "figures": dict(record.figures),
        "digests": dict(record.digests),
        "done": record.done,
    }


def _record_cells(record: ReleaseRecord) -> tuple[str, ...]:
    why = record.reason if record.done else f"{record.reason} (under way, or interrupted)"
    return (
        *(str(record.number), moment(record.when_ms / 1000), record.who, record.kind),
        *(str(record.source or "-"), str(record.target)),
        *(record.digests.get("adapter.digest", "")[:DIGEST_SHOWN], why),
    )


# ---- gates ----------------------------------------------------------------------------------------------


def gates(parts: Parts, home: Home, name: str, file: Path | None, format: Format) -> None:
    """Show what every version of a name must meet, or replace it by what `file` says."""
    asked = None if file is None else read_conditions(_read(file), str(file))
    with parts.registry(home) as registry:
        if asked is not None:
            registry.set_conditions(name, as_json(asked))
        found = as_json(of_name(registry, name))

    def table(out: Console) -> None:
        if not found:
            out.print(f"nothing is asked of every version of {name}; only its own recipe's gates hold")
        else:
            out.print(yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip(), soft_wrap=True)

    emit(found, format, table)


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
