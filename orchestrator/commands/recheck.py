"""Judge a registered version again, by the recipe kept with it and its scores in the registry. Pure reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator import judgement
from orchestrator.api.errors import Refused
from orchestrator.commands.parts import Parts
from orchestrator.contracts import AdapterVersion, NoSuchVersion, Registry, Scores
from orchestrator.control.submission import read_order
from orchestrator.gate import Verdict
from orchestrator.home import Home
from orchestrator.judgement import Conditions, Evidence, read_conditions
from orchestrator.registry.evaluations import read_controls, read_scores
from orchestrator.registry.outlines import structure_of
from workers.types import BaseSpec

CHAMPION = "champion"
PARENTS_TAG = "fusion.parents"


def judge(registry: Registry, version: AdapterVersion, base: Callable[[], Path | None]) -> Verdict:
    """The verdict on a version beside the present champion. Raises Refused if its gates are not known.

    `base` finds the folder of its base; it is asked only if a gate is about that.
    """
    conditions = [conditions_of(registry, version), of_name(registry, version.name)]
    champion = champion_of(registry, version.name)
    of_base = base() if any("shapes" in asked.structure for asked in conditions) else None
    evidence = Evidence(
        scores=_evaluation(registry, version),
        parents=_parent_scores(registry, version),
        champion=None if champion is None else _evaluation(registry, champion),
        structure=structure_of(registry, version, of_base),
        fused=bool(parents_of(version)),
    )
    return judgement.judge(conditions, evidence)


def _evaluation(registry: Registry, version: AdapterVersion) -> Sequence[Scores]:
    try:
        return read_scores(registry, version)
    except NoSuchVersion as error:
        label = f"{version.name}/{version.version}"
        raise Refused(f"{label} holds no evaluation report, so nothing is known of its scores") from error


def of_name(registry: Registry, name: str) -> Conditions:
    """What was set for all versions of a name (`chorus adapters gates`)."""
    return read_conditions(dict(registry.conditions(name)), f"the gates of {name}")


def conditions_of(registry: Registry, version: AdapterVersion) -> Conditions:
    """The gates in the recipe, or in the fusion of the pipeline, that the version was made by."""
    label = f"{version.name}/{version.version}"
    try:
        recipe: dict[str, Any] = yaml.safe_load(registry.read_text(version, "recipe.yaml"))
        return _of_fusion(recipe["fuse"]) if "fuse" in recipe else _of_recipe(recipe)
    except NoSuchVersion as error:
        raise Refused(f"{label} holds no recipe, so its gates are not known") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"the recipe kept with {label} cannot be read, so its gates are not known") from error


def _of_fusion(fuse: dict[str, Any]) -> Conditions:
    """Blocks that came later are absent from older recipes."""
    asked = fuse["evaluation"]
    return Conditions(
        gates=asked["gates"],
        champion_margin=asked["champion_margin"],
        non_inferiority=asked.get("non_inferiority", {}),
        retention=asked["retention"],
        worst_task=asked.get("worst_task"),
        structure=tuple(asked.get("structure", ())),
    )


def _of_recipe(recipe: dict[str, Any]) -> Conditions:
    asked, task = recipe["evaluation"], str(recipe["task"])

    def of_task(block: dict[str, Any]) -> dict[str, Any]:
        return {f"{task}.{key}": value for key, value in block.items()}

    return Conditions(
        gates=of_task(asked["gates"]),
        champion_margin=of_task(asked["champion_margin"]),
        non_inferiority=of_task(asked.get("non_inferiority", {})),
        structure=tuple(asked.get("structure", ())),
    )


def known_base(parts: Parts, home: Home, digest: str) -> BaseSpec | None:
    """The base of that digest as the newest job of this home had it."""
    if not home.has_store:
        return None
    with parts.store(home) as store:
        specs = [read_order(job.plan).job.base for job in store.jobs()]
    return next((spec for spec in reversed(specs) if spec.digest == digest), None)


def parents_of(version: AdapterVersion) -> list[str]:
    """`name/version` of each adapter that it was fused from."""
    return [parent for parent in version.tags.get(PARENTS_TAG, "").split(",") if parent]


def champion_of(registry: Registry, name: str) -> AdapterVersion | None:
    try:
        return registry.version(name, CHAMPION)
    except NoSuchVersion:
        return None


def scores_of(version: AdapterVersion) -> dict[str, float]:
    """Its own metrics, `<task>/<metric>` in the registry, under the keys of gates."""
    own = {key: value for key, value in version.metrics.items() if key.count("/") == 1}
    return {key.replace("/", "."): value for key, value in own.items() if not key.startswith("base/")}


def _parent_scores(registry: Registry, version: AdapterVersion) -> dict[str, float]:
    """Of every parent, the scores on its own task: what a fusion is asked to keep.

    As measured beside the fusion; else as the parent was registered, where that was on the same rows.
    """
    parents = parents_of(version)
    if not parents:
        return {}
    beside = read_controls(registry, version)
    rows = {score.task: score.dataset_digest for score in _evaluation(registry, version)}
    found: dict[str, float] = {}
    for parent in parents:
        name, _, number = parent.rpartition("/")
        scores = beside.get(parent) or _evaluation(registry, registry.version(name, number))
        found |= judgement.flat([score for score in scores if score.dataset_digest == rows.get(score.task)])
    return found
