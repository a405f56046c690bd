"""Judge a registered version again, by the recipe kept with it and its scores in the registry. Pure reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.commands.errors import Refused
from orchestrator.contracts import AdapterVersion, NoSuchVersion, Registry
from orchestrator.gate import Verdict, check

CHAMPION = "champion"


@dataclass(frozen=True)
class Conditions:
    """What a version's recipe asks of it; keys are `<task>.<metric>`."""

    gates: Mapping[str, str]
    champion_margin: Mapping[str, float]
    retention: Mapping[str, str]


def judge(registry: Registry, version: AdapterVersion) -> Verdict:
    """The verdict on a version beside the present champion. Raises Refused if its gates are not known."""
    conditions = conditions_of(registry, version)
    champion = champion_of(registry, version.name)
    return check(
        gates=conditions.gates,
        champion_margins=conditions.champion_margin,
        retention=conditions.retention,
        scores=scores_of(version),
        parent_scores=_parent_scores(registry, version),
        champion_scores=None if champion is None else scores_of(champion),
    )


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
    asked: dict[str, Any] = fuse["evaluation"]
    return Conditions(asked["gates"], asked["champion_margin"], asked["retention"])


def _of_recipe(recipe: dict[str, Any]) -> Conditions:
    asked: dict[str, dict[str, Any]] = recipe["evaluation"]
    gates, margins = asked["gates"], asked["champion_margin"]
    task = str(recipe["task"])
    return Conditions(
        gates={f"{task}.{key}": bound for key, bound in gates.items()},
        champion_margin={f"{task}.{key}": by for key, by in margins.items()},
        retention={},
    )


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
    """Of every parent, the scores on its own task: what a fusion is asked to keep."""
    found: dict[str, float] = {}
    for parent in filter(None, version.tags.get("fusion.parents", "").split(",")):
        name, _, number = parent.rpartition("/")
        found |= scores_of(registry.version(name, number))
    return found
