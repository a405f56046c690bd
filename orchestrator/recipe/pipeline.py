"""A pipeline file: several jobs and one fusion of their adapters. A single recipe is a pipeline of one job.

Owns the keys of a pipeline and what must hold between its jobs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from orchestrator.gate import OF_REPLIES, metric_name, unknown_metric
from orchestrator.recipe.file import Key, Node, read_yaml
from orchestrator.recipe.fuse_block import Fuse, Parent
from orchestrator.recipe.keys import refusal, rewrite_aliases
from orchestrator.recipe.load import PIPELINE_KEYS, LoadedRecipe, check_recipe, folder_of
from orchestrator.recipe.parts import Model, Name
from orchestrator.recipe.recipe import Recipe
from workers.manifest import json_digest
from workers.types import BadInput

# ---- keys -----------------------------------------------------------------------------------------------


class PipelineFile(Model):
    """The keys of a pipeline file. Each job is a recipe file or a recipe written in place."""

    version: Literal[1]
    name: Name
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Recipe keys laid under every job."""
    jobs: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)]
    fuse: Fuse | None = None


# ---- loaded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline whose jobs, bases and data were found and checked."""

    name: str
    path: Path
    jobs: tuple[LoadedRecipe, ...]
    fuse: Fuse | None
    references: tuple[LoadedRecipe, ...] = ()
    """The recipes that registered parents are judged by, in the order of those parents."""
    notices: tuple[str, ...] = ()

    def job(self, name: str) -> LoadedRecipe:
        return next(job for job in self.jobs if job.recipe.name == name)

    def parents(self) -> tuple[tuple[Parent, LoadedRecipe], ...]:
        """Each adapter of the fusion beside the recipe its task is judged by."""
        references = iter(self.references)
        adapters = self.fuse.adapters if self.fuse else ()
        return tuple(
            (parent, self.job(parent.job) if parent.job else next(references)) for parent in adapters
        )

    @property
    def external_adapters(self) -> tuple[str, ...]:
        """NAME@REF of every registered version the fusion needs; the plan wants their digests."""
        return tuple(parent.adapter for parent, _ in self.parents() if parent.adapter)

    def canonical(self) -> dict[str, Any]:
        """Every key with its value, JSON only, in a fixed form: equal meaning gives equal values."""
        jobs = [job.recipe.canonical() for job in self.jobs]
        return {"version": 1, "name": self.name, "jobs": jobs, "fuse": self._canonical_fuse()}

    def content_hash(self) -> str:
        """SHA-256 of the canonical form."""
        return json_digest(self.canonical())

    def to_yaml(self) -> str:
        """The canonical form as a pipeline file."""
        return yaml.safe_dump(self.canonical(), sort_keys=False, allow_unicode=True)

    def _canonical_fuse(self) -> dict[str, Any] | None:
        if self.fuse is None:
            return None
        canonical = self.fuse.model_dump(mode="json")
        if self.fuse.release is not None:
            canonical["release"]["out"] = self._relative(self.fuse.release.out)
        for parent in canonical["adapters"]:
            parent["recipe"] = self._relative(parent["recipe"]) if parent["recipe"] else None
        return canonical

    def _relative(self, path: str) -> str:
        return Path(os.path.relpath(path, self.path.parent)).as_posix()


def load_pipeline(path: Path) -> LoadedPipeline:
    """Read and check a pipeline file, or one recipe. Raises BadInput naming file, line and key."""
    path = Path(path)
    node = read_yaml(path)
    if not any(key in node.mapping() for key in PIPELINE_KEYS):
        job = check_recipe(node)
        return LoadedPipeline(job.recipe.name, path, (job,), None, (), job.notices)
    return _check_pipeline(node, path)


def _check_pipeline(node: Node, path: Path) -> LoadedPipeline:
    file = _parse(node)
    defaults, notices = rewrite_aliases(node.mapping().get("defaults", Node({}, node.place)))
    jobs = tuple(check_recipe(_recipe_node(item), defaults) for item in _items(node, "jobs"))
    _check_names(node, jobs, file.fuse)
    references = _references(file.fuse, node)
    for job in (*jobs, *references):
        notices += job.notices
    loaded = LoadedPipeline(file.name, path, jobs, file.fuse, references, tuple(dict.fromkeys(notices)))
    if file.fuse is not None:
        _check_fusion(node, loaded, file.fuse)
    return loaded


def _parse(node: Node) -> PipelineFile:
    try:
        return PipelineFile.model_validate(_anchored(node).plain())
    except ValidationError as error:
        raise refusal(error, node, PipelineFile) from error


def _anchored(node: Node) -> Node:
    """Paths of the fusion made absolute."""
    fuse = node.mapping().get("fuse")
    if fuse is None or not isinstance(fuse.value, dict):
        return node
    keys = dict(fuse.value)
    if "release" in keys:
        keys["release"] = _with_absolute(keys["release"], "out")
    adapters = keys.get("adapters")
    if adapters is not None and isinstance(adapters.value, list):
        items = [_with_absolute(item, "recipe") for item in adapters.value]
        keys["adapters"] = Node(items, adapters.place)
    return Node({**node.mapping(), "fuse": Node(keys, fuse.place)}, node.place)


def _with_absolute(node: Node, key: str) -> Node:
    child = node.value.get(key) if isinstance(node.value, dict) else None
    if child is None or not isinstance(child.value, str):
        return node
    absolute = os.path.normpath(folder_of(child.place) / child.value)
    return Node({**node.mapping(), key: Node(absolute, child.place)}, node.place)


def _items(node: Node, key: str) -> list[Node]:
    value = node.mapping()[key].value
    return value if isinstance(value, list) else []


def _recipe_node(item: Node) -> Node:
    """The recipe a job entry names, or the entry itself when it is written in place."""
    if not isinstance(item.value, str):
        return item
    path = item.place.file.parent / item.value
    if not path.is_file():
        raise BadInput(f"{item.place}: jobs: no such recipe file: {path}")
    return read_yaml(path)


def _references(fuse: Fuse | None, node: Node) -> tuple[LoadedRecipe, ...]:
    found: list[LoadedRecipe] = []
    for index, parent in enumerate(fuse.adapters if fuse else ()):
        if parent.recipe is None:
            continue
        if not Path(parent.recipe).is_file():
            raise _bad(node, ["fuse", "adapters", index, "recipe"], f"no such recipe file: {parent.recipe}")
        found.append(check_recipe(read_yaml(Path(parent.recipe))))
    return tuple(found)


# ---- checks between jobs --------------------------------------------------------------------------------


def _check_names(node: Node, jobs: Sequence[LoadedRecipe], fuse: Fuse | None) -> None:
    names: set[str] = set()
    for index, job in enumerate(jobs):
        if job.recipe.name in names:
            why = f"two jobs are named {job.recipe.name!r}; give each its own name"
            raise _bad(node, ["jobs", index], why)
        names.add(job.recipe.name)
    if fuse is None:
        return
    if fuse.name in names:
        raise _bad(node, ["fuse", "name"], f"fuse.name: a job is named {fuse.name!r} already")
    for index, parent in enumerate(fuse.adapters):
        if parent.job is not None and parent.job not in names:
            why = f"fuse.adapters[{index}].job: no job is named {parent.job!r}; there are {', '.join(names)}"
            raise _bad(node, ["fuse", "adapters", index, "job"], why)


def _check_fusion(node: Node, loaded: LoadedPipeline, fuse: Fuse) -> None:
    parents = loaded.parents()
    tasks: set[str] = set()
    for index, (parent, recipe) in enumerate(parents):
        if recipe.base.digests != parents[0][1].base.digests:
            why = (
                f"{parent.label!r} has another base than {parents[0][0].label!r}; only one base can be fused"
            )
            raise _bad(node, ["fuse", "adapters", index], why)
        if recipe.recipe.task in tasks:
            why = f"two adapters have the task {recipe.recipe.task!r}; a fusion is judged task by task"
            raise _bad(node, ["fuse", "adapters", index], why)
        tasks.add(recipe.recipe.task)
    allowed = {f"{r.recipe.task}.{metric}" for _, r in parents for metric in r.recipe.metrics}
    _check_search(node, fuse, allowed, [recipe.recipe for _, recipe in parents])
    _check_groups(node, fuse, [recipe for _, recipe in parents])
    _check_fused_gates(node, fuse, allowed)


def _check_search(node: Node, fuse: Fuse, allowed: set[str], recipes: Sequence[Recipe]) -> None:
    """A floor for every task, on a metric that its evaluation has without replies, and rows to search on."""
    if fuse.search is None:
        return
    at: list[Key] = ["fuse", "search", "floors"]
    for key in fuse.search.floors:
        if metric_name(key) in OF_REPLIES:
            raise _bad(node, [*at, key], f"fuse.search.floors: {key} needs replies; a search generates none")
        if why := unknown_metric(key, allowed):
            raise _bad(node, [*at, key], f"fuse.search.floors: {why}")
    floored = [key.rpartition(".")[0] for key in fuse.search.floors]
    for recipe in recipes:
        if floored.count(recipe.task) != 1:
            why = f"fuse.search.floors: give the task {recipe.task!r} one metric and its floor"
            raise _bad(node, at, why)
        if not recipe.datasets_of("validation"):
            why = f"fuse.search: {recipe.name!r} has no validation rows to search on; set its evals_per_epoch"
            raise _bad(node, ["fuse", "search"], why)


def _check_groups(node: Node, fuse: Fuse, recipes: Sequence[LoadedRecipe]) -> None:
    """Every group has modules: a word that was misspelt would be searched in vain."""
    left = {name for r in recipes for name in r.base.targets(r.recipe.lora_target_modules)}
    names = set(left)
    for index, part in enumerate(fuse.search.groups if fuse.search else ()):
        taken = {name for name in left if part in name}
        if not taken:
            why = f"{part!r} is left no module by the groups before it"
            if not any(part in name for name in names):
                why = (
                    f"no module that is fused has {part!r} in its name; there are {', '.join(_words(names))}"
                )
            raise _bad(node, ["fuse", "search", "groups", index], f"fuse.search.groups: {why}")
        left -= taken


def _words(modules: set[str]) -> list[str]:
    """The last two parts of the modules' names: `self_attn` and `q_proj`."""
    return sorted({part for name in modules for part in name.split(".")[-2:]})


def _check_fused_gates(node: Node, fuse: Fuse, allowed: set[str]) -> None:
    problem = fuse.evaluation.problem(allowed)
    if problem is not None:
        (block, key), why = problem
        raise _bad(node, ["fuse", "evaluation", block, key], f"fuse.evaluation.{block}: {why}")


def _bad(node: Node, path: list[Key], why: str) -> BadInput:
    return BadInput(f"{node.at(path).place}: {why}")


# ---- schema ---------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe or pipeline file, for editors."""
    recipe = Recipe.model_json_schema()
    pipeline = PipelineFile.model_json_schema()
    definitions = {**recipe.pop("$defs"), **pipeline.pop("$defs"), "Recipe": recipe, "PipelineFile": pipeline}
    partial = {key: value for key, value in recipe.items() if key != "required"}
    definitions["PartialRecipe"] = partial
    pipeline["properties"]["defaults"] = {"$ref": "#/$defs/PartialRecipe"}
    pipeline["properties"]["jobs"]["items"] = {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/PartialRecipe"}]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Chorus recipe or pipeline",
        "if": {"required": ["jobs"]},
        "then": {"$ref": "#/$defs/PipelineFile"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": definitions,
    }
