"""From a recipe file to a recipe that can run: keys, base, data, all refused in words before anything starts.

Owns every check that needs more than the recipe's own keys.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from orchestrator.recipe.base_file import Base, anchor, load_base
from orchestrator.recipe.file import Key, Node, Place, merge, read_yaml
from orchestrator.recipe.keys import refusal, rewrite_aliases
from orchestrator.recipe.recipe import Recipe, SplitName
from orchestrator.recipe.splits import Split, check_split
from workers.rows import dataset_file
from workers.types import BadInput

LENGTH_KEYS = ("num_epochs", "max_steps")
PIPELINE_KEYS = ("jobs", "fuse", "defaults")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe whose base and data were found and checked."""

    recipe: Recipe
    path: Path
    notices: tuple[str, ...]
    """Keys that were read under another name, one sentence each."""
    base: Base
    train: Split
    validation: Split
    test: Split

    @property
    def registered_name(self) -> str:
        return self.recipe.registry.name or f"{self.base.slug}.{self.recipe.task}"

    @property
    def world_size(self) -> int:
        return self.recipe.resources.world_size or self.base.world_size


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check one recipe file. Raises BadInput: one sentence with file, line and key."""
    node = read_yaml(path)
    if any(key in node.mapping() for key in PIPELINE_KEYS):
        raise BadInput(f"{path}: this is a pipeline of several jobs, where one recipe is wanted")
    return check_recipe(node)


def check_recipe(node: Node, defaults: Node | None = None) -> LoadedRecipe:
    """The recipe written at `node`, with `defaults` laid under it. Raises BadInput."""
    node.mapping()
    node, notices = rewrite_aliases(node)
    if defaults is not None:
        node = merge(_without_length(defaults, node), node)
    recipe = _parse(node)
    _check_gates(recipe, node)
    base = load_base(recipe.base_model, node.at(["base_model"]).place)
    _check_against_base(recipe, base, node)
    splits = {split: _check_rows(recipe, split, node) for split in ("train", "validation", "test")}
    return LoadedRecipe(recipe, node.place.file, notices, base, **splits)


def _without_length(defaults: Node, over: Node) -> Node:
    """A job that says how long it trains replaces the defaults' way of saying it."""
    if not any(key in over.mapping() for key in LENGTH_KEYS):
        return defaults
    kept = {key: child for key, child in defaults.mapping().items() if key not in LENGTH_KEYS}
    return Node(kept, defaults.place)


def _parse(node: Node) -> Recipe:
    try:
        return Recipe.model_validate(_anchored(node).plain(), context=folder_of(node.place))
    except ValidationError as error:
        raise refusal(error, node, Recipe) from error


def _anchored(node: Node) -> Node:
    """Paths made absolute: each is relative to the file it is written in, which may be the defaults'."""
    keys = dict(node.mapping())
    base, datasets = keys.get("base_model"), keys.get("datasets")
    if base is not None and isinstance(base.value, str):
        keys["base_model"] = Node(anchor(base.value, folder_of(base.place)), base.place)
    if datasets is not None and isinstance(datasets.value, list):
        keys["datasets"] = Node([_anchored_dataset(item) for item in datasets.value], datasets.place)
    return Node(keys, node.place)


def _anchored_dataset(item: Node) -> Node:
    path = item.value.get("path") if isinstance(item.value, dict) else None
    if path is None or not isinstance(path.value, str):
        return item
    absolute = os.path.normpath(folder_of(path.place) / path.value)
    return Node({**item.mapping(), "path": Node(absolute, path.place)}, item.place)


def folder_of(place: Place) -> Path:
    """The absolute folder that paths written at `place` are relative to."""
    return Path(os.path.abspath(place.file.parent))  # noqa: PTH100 - resolve() would follow links


# ---- checks ---------------------------------------------------------------------------------------------


def _check_gates(recipe: Recipe, node: Node) -> None:
    problem = recipe.evaluation.problem(recipe.metrics)
    if problem is not None:
        (block, key), why = problem
        raise _bad(node, ["evaluation", block, key], f"evaluation.{block}: {why}")


def _check_against_base(recipe: Recipe, base: Base, node: Node) -> None:
    longest = base.max_position_embeddings
    if longest is not None and recipe.sequence_len > longest:
        why = f"sequence_len {recipe.sequence_len} is longer than the base allows; its limit is {longest}"
        raise _bad(node, ["sequence_len"], why)
    if recipe.lora_target_modules == "all-linear":
        return
    for index, module in enumerate(recipe.lora_target_modules):
        if not base.targets([module]):
            names = ", ".join(base.module_names())
            why = f"lora_target_modules: {module!r} matches no linear layer of the base; it has {names}"
            raise _bad(node, ["lora_target_modules", index], why)


def _check_rows(recipe: Recipe, split: SplitName, node: Node) -> Split:
    datasets = recipe.datasets_of(split)
    if not datasets and split == "validation" and recipe.evals_per_epoch == 0:
        return Split()
    if not datasets:
        raise _bad(node, ["datasets"], f"no data set has the split {split!r}; add one")
    for spec in datasets:
        index = next(i for i, item in enumerate(recipe.datasets) if item.path == spec.path)
        try:
            dataset_file(spec)
        except BadInput as error:
            raise _bad(node, ["datasets", index, "path"], f"datasets[{index}].path: {error}") from error
    return check_split(datasets)


def _bad(node: Node, path: list[Key], why: str) -> BadInput:
    return BadInput(f"{node.at(path).place}: {why}")
