"""Keys as other trainers spell them, and the words of a refusal.

Owns the alias table and the translation of pydantic's errors into one sentence with file, line and key.
Knows no model by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.recipe.file import Node
from workers.types import BadInput

ALIASES: Mapping[str, str] = {
    "model": "base_model",
    "model_id": "base_model",
    "model_name_or_path": "base_model",
    "cutoff_len": "sequence_len",
    "context_length": "sequence_len",
    "max_length": "sequence_len",
    "max_seq_len": "sequence_len",
    "max_seq_length": "sequence_len",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "effective_batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "epochs": "num_epochs",
    "n_epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
}
"""Top-level keys of a recipe: spelling of axolotl, LLaMA-Factory, ms-swift, TRL or Hugging Face -> ours."""

DATASET_ALIASES: Mapping[str, str] = {"sample_count": "max_samples", "num_samples": "max_samples"}

ELSEWHERE: Mapping[str, str] = {
    "adapter": "every job trains a LoRA adapter, so leave it out",
    "bf16": "the base file says it, as dtype",
    "deepspeed": "the base file says it",
    "gradient_checkpointing": "the base file says it, as activation_checkpointing",
    "optimizer": "the optimizer is AdamW, so leave it out",
    "output_dir": "chorus keeps checkpoints and adapters itself, so leave it out",
    "val_set_size": "give the data set a validation split instead",
    "warmup_steps": "write warmup_ratio instead, a share of all steps",
    "<<": "merge keys are not read; a pipeline's defaults do that",
}
"""Keys people bring from other trainers that a recipe has no place for, and what to do instead."""


# ---- aliases --------------------------------------------------------------------------------------------


def rewrite_aliases(node: Node) -> tuple[Node, tuple[str, ...]]:
    """The recipe with our keys, and one notice for each key that was rewritten. Raises BadInput."""
    if not isinstance(node.value, dict):
        return node, ()
    notices: list[str] = []
    keys = _rename(node.value, ALIASES, notices)
    keys = _target_linear(keys, notices)
    keys = _global_batch(keys, notices)
    datasets = keys.get("datasets")
    if datasets is not None and isinstance(datasets.value, list):
        items = [_dataset(item, notices) for item in datasets.value]
        keys["datasets"] = Node(items, datasets.place)
    return Node(keys, node.place), tuple(notices)


def _dataset(item: Node, notices: list[str]) -> Node:
    if not isinstance(item.value, dict):
        return item
    return Node(_rename(item.value, DATASET_ALIASES, notices), item.place)


def _rename(keys: dict[str, Node], aliases: Mapping[str, str], notices: list[str]) -> dict[str, Node]:
    renamed: dict[str, Node] = {}
    for key, child in keys.items():
        name = aliases.get(key, key)
        if name in renamed:
            raise BadInput(f"{child.place}: {key!r} says again what {renamed[name].place} says; keep one")
        if name != key:
            notices.append(f"{child.place}: {key!r} is read as {name!r}")
        renamed[name] = child
    return renamed


def _target_linear(keys: dict[str, Node], notices: list[str]) -> dict[str, Node]:
    flag = keys.get("lora_target_linear")
    if flag is None or flag.value is not True or "lora_target_modules" in keys:
        return keys
    notices.append(f"{flag.place}: 'lora_target_linear: true' is read as 'lora_target_modules: all-linear'")
    rest = {key: child for key, child in keys.items() if key != "lora_target_linear"}
    return {**rest, "lora_target_modules": Node("all-linear", flag.place)}


def _global_batch(keys: dict[str, Node], notices: list[str]) -> dict[str, Node]:
    """The rows of a step must not depend on how many ranks a host has, so a recipe names their number."""
    micro, accumulation = keys.get("micro_batch_size"), keys.get("gradient_accumulation_steps")
    first = micro or accumulation
    if first is None:
        return keys
    if "global_batch_size" in keys:
        given = keys["global_batch_size"].place
        raise BadInput(f"{first.place}: global_batch_size at {given} says the rows of a step; keep one")
    rows = _positive(micro, "micro_batch_size") * _positive(accumulation, "gradient_accumulation_steps")
    product = "micro_batch_size x gradient_accumulation_steps"
    notices.append(f"{first.place}: {product} is read as 'global_batch_size: {rows}'")
    dropped = ("micro_batch_size", "gradient_accumulation_steps")
    rest = {key: child for key, child in keys.items() if key not in dropped}
    return {**rest, "global_batch_size": Node(rows, first.place)}


def _positive(node: Node | None, key: str) -> int:
    if node is None:
        return 1
    if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value < 1:
        raise BadInput(f"{node.place}: {key} should be a whole number from 1, found {node.plain()!r}")
    return node.value


# ---- refusals -------------------------------------------------------------------------------------------


def refusal(error: ValidationError, node: Node, model: type[BaseModel]) -> BadInput:
    """One sentence for the first thing wrong: an unknown key before anything else, then by line."""
    problems = _innermost(error.errors(include_url=False))
    problems.sort(key=lambda found: (found["type"] != "extra_forbidden", node.at(found["loc"]).place.line))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return BadInput(_sentence(problems[0], node, model) + more)


def _innermost(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """A list with a wrong item is also reported as too short: only the item is worth saying."""
    locs = [problem["loc"] for problem in problems]
    return [
        problem
        for problem in problems
        if not any(
            len(loc) > len(problem["loc"]) and loc[: len(problem["loc"])] == problem["loc"] for loc in locs
        )
    ]


def _sentence(problem: ErrorDetails, node: Node, model: type[BaseModel]) -> str:
    loc = problem["loc"]
    place = node.at(loc).place
    key = _key_path(node, loc)
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key {key!r}; {_suggestion(str(loc[-1]), valid_keys(model, loc[:-1]))}"
    if problem["type"] == "missing":
        return f"{place}: key {'.'.join(str(part) for part in loc)!r} is missing"
    if problem["type"] == "value_error":
        return f"{place}: {key + ': ' if key else ''}{problem['ctx']['error']}"  # pyright: ignore[reportTypedDictNotRequiredAccess]
    return f"{place}: {key} {_plainly(problem['msg'])}, found {_short(problem['input'])}"


def _key_path(node: Node, loc: Sequence[str | int]) -> str:
    """`datasets[0].path`: the written part of pydantic's location, without the union tags it may end in."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(node.value, dict) and part in node.value:
            path += f".{part}" if path else part
        else:
            break
        node = node.at([part])
    return path


def _plainly(message: str) -> str:
    """Pydantic's words in a recipe's."""
    for theirs, ours in (
        ("Input should", "should"),
        ("String should", "should"),
        ("Tuple should", "should"),
        (" after validation", ""),
        ("valid tuple", "list"),
        ("valid list", "list"),
        ("valid dictionary", "block of keys and values"),
    ):
        message = message.replace(theirs, ours, 1)
    return message


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggestion(key: str, valid: Sequence[str]) -> str:
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    near = get_close_matches(key.lower(), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(valid)}"


def valid_keys(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys of the model that stands at `loc` below `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        inner = _model_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside `X | None`, `tuple[X, ...]` and their like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)
