"""`adapters`, `promote` and `rollback`: versions in the registry, shown, judged and moved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.api.errors import Refused
from orchestrator.api.views import version_view
from orchestrator.commands.filters import Filters, chosen
from orchestrator.commands.output import Format, emit, figure, grid, moment
from orchestrator.commands.parts import Parts
from orchestrator.commands.recheck import champion_of, judge, known_base, scores_of
from orchestrator.contracts import AdapterVersion, Registry
from orchestrator.gate import METRICS
from orchestrator.home import Home
from orchestrator.judgement import FINDINGS_TAG, GATE_TAG, gate_tags
from workers.types import BadInput

REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)[@/](?P<ref>[A-Za-z0-9_-]+)")
LIST_COLUMNS = ("name", "version", "aliases", "gates", "task", "scores", "created")
HEADLINES = ("perplexity", "macro_f1", "hit_at_1")
"""Of dialogue, classification, recommendation."""


def find(registry: Registry, reference: str) -> AdapterVersion:
    """The version that NAME@ALIAS, NAME@NUMBER or NAME/NUMBER means. Raises BadInput, NoSuchVersion."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise BadInput(f"{reference!r} names no version; write NAME@champion, NAME@3 or NAME/3")
    return registry.version(match["name"], match["ref"])


# ---- showing --------------------------------------------------------------------------------------------


def list_adapters(parts: Parts, home: Home, filters: Filters, format: Format) -> None:
    """The versions that all filters let through."""
    versions: Sequence[AdapterVersion] = ()
    if (home.folder / "mlflow").is_dir():
        with parts.registry(home) as registry:
            versions = chosen(registry.versions(filters.name), filters)

    def table(out: Console) -> None:
        if versions:
            out.print(grid(LIST_COLUMNS, [_cells(version) for version in versions], right=("version",)))
        else:
            asked = "no adapters that fit" if filters != Filters() else "no adapters"
            out.print(f"{asked} in {home.folder}; `chorus run FILE` makes some", soft_wrap=True)

    emit([version_view(version) for version in versions], format, table)


def _cells(version: AdapterVersion) -> tuple[str, ...]:
    return (
        version.name,
        str(version.version),
        ", ".join(version.aliases),
        version.tags.get(GATE_TAG, ""),
        version.tags.get("task", ""),
        ", ".join(f"{key} {figure(value)}" for key, value in _headlines(version).items()),
        moment(version.created_ms / 1000),
    )


def _headlines(version: AdapterVersion) -> dict[str, float]:
    """The one metric of each task that a list has room for."""
    scores = scores_of(version)
    return {key: value for key, value in scores.items() if key.rpartition(".")[2] in HEADLINES}


def show(parts: Parts, home: Home, reference: str, card: bool, format: Format) -> None:
    """One version: scores beside the base's, gates, tags; or its card, verified like every byte."""
    with parts.registry(home) as registry:
        version = find(registry, reference)
        text = registry.read_text(version, "README.md") if card else ""

    def table(out: Console) -> None:
        if card:
            print(text, end="")
            return
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        out.print(f"{version.name}/{version.version}{aliases}, made {moment(version.created_ms / 1000)}")
        out.print()
        out.print(grid(("metric", "base", "adapter"), _beside_base(version), right=("base", "adapter")))
        out.print()
        if view["gates"]:
            out.print(
                grid(("gate", "required", "found", "met"), [_gate_cells(gate) for gate in view["gates"]])
            )
            out.print()
        tags = {key: value for key, value in version.tags.items() if key != FINDINGS_TAG}
        out.print(grid(("tag", "value"), sorted(tags.items())))

    view = version_view(version)
    emit({**view, "card": text} if card else view, format, table)


def _gate_cells(gate: Mapping[str, Any]) -> tuple[str, ...]:
    return (gate["metric"], gate["required"], figure(gate["found"]), "yes" if gate["passed"] else "no")


def _beside_base(version: AdapterVersion) -> list[tuple[str, str, str]]:
    own = scores_of(version)
    base = {
        key.removeprefix("base/").replace("/", "."): value
        for key, value in version.metrics.items()
        if key.startswith("base/")
    }
    keys = sorted(own.keys() | base.keys())
    return [(key, figure(base.get(key)), figure(own.get(key))) for key in keys]


def compare(parts: Parts, home: Home, references: Sequence[str], format: Format) -> None:
    """Scores of several versions side by side, with the best of each marked."""
    with parts.registry(home) as registry:
        versions = [find(registry, reference) for reference in references]
    labels = [f"{version.name}/{version.version}" for version in versions]
    scores = [scores_of(version) for version in versions]
    keys = sorted({key for found in scores for key in found})

    def table(out: Console) -> None:
        rows = [(key, *_marked(key, [found.get(key) for found in scores])) for key in keys]
        out.print(grid(("metric", *labels), rows, right=labels))
        out.print("* the best of its row")

    value = {
        "versions": [version_view(version) for version in versions],
        "metrics": {
            key: {label: found.get(key) for label, found in zip(labels, scores, strict=True)} for key in keys
        },
    }
    emit(value, format, table)


def _marked(key: str, values: Sequence[float | None]) -> list[str]:
    metric = METRICS.get(key.rpartition(".")[2])
    known = [value for value in values if value is not None]
    if metric is None or len(known) < 2:
        return [figure(value) for value in values]
    best = min(known) if metric.lower_is_better else max(known)
    return [figure(value) + ("*" if value == best else "") for value in values]


# ---- moving ---------------------------------------------------------------------------------------------


def promote(parts: Parts, home: Home, name: str, ref: str, out: Console) -> None:
    """Make a version champion if it meets its gates now. Raises Refused saying by how much it does not."""
    with parts.registry(home) as registry:
        registry.finish_move(name)
        version = registry.version(name, ref)
        label = f"{name}/{version.version}"
        champion = champion_of(registry, name)
        if champion is not None and champion.version == version.version:
            out.print(f"{label} is champion already")
            return
        verdict = judge(registry, version, lambda: _base_folder(parts, home, version))
        registry.set_tags(name, version.version, {FINDINGS_TAG: gate_tags(verdict)[FINDINGS_TAG]})
        if not verdict.passed:
            raise Refused(f"{label} is not promoted: {verdict.words}")
        expected = champion.version if champion else None
        reason = f"chorus promote: {verdict.words}"
        registry.promote(name, version.version, expected, reason, scores_of(version))
        was = f"; {name}/{expected} is now previous" if expected else ""
        out.print(f"{label} is champion of {name}: {verdict.words}{was}", soft_wrap=True)


def _base_folder(parts: Parts, home: Home, version: AdapterVersion) -> Path | None:
    spec = known_base(parts, home, version.tags.get("base.digest", ""))
    return None if spec is None else Path(spec.path)


def rollback(parts: Parts, home: Home, name: str, out: Console) -> None:
    """Make the previous champion champion again; given again, it does not put the other one back."""
    with parts.registry(home) as registry:
        present = champion_of(registry, name)
        left = present.version if present else None
        last = next(reversed(registry.history(name)), None)
        if last is not None and last.kind == "rollback" and last.target == left:
            left = last.source  # asked again, of the same champion: the registry ends it, or moves nothing
        champion = registry.rollback(name, left, "chorus rollback")
    undo = f"`chorus promote {name} {left}{home.flag()}` undoes it"
    out.print(f"{name}/{champion.version} is champion of {name} again; {undo}", soft_wrap=True)
