"""What PEFT's `adapter_config.json` may say, for an adapter that is plain LoRA and nothing else.

Default deny: a key not known here may change what the adapter computes, so a value in it is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.types import BadInput

CONFIG = "adapter_config.json"

KNOWN = frozenset(
    {"peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"}
    | {"base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"rank_pattern", "alpha_pattern", "init_lora_weights", "megatron_core", "qalora_group_size"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
)
"""Keys that are read, or on which the function of a trained adapter does not depend."""

WAYS_OUT = {
    "use_dora": "merge it into its base with PEFT's merge_and_unload, or train it again without DoRA",
    "bias": "train it again with bias: none",
    "target_parameters": "train it again with target_modules only",
    "fan_in_fan_out": "train it on a base with linear layers, not Conv1D",
}

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""The others change the base's weights, so that the factors alone are not the adapter."""


def read_config(path: Path) -> dict[str, Any]:
    """The configuration at `path`; what is read of it is of the types that PEFT writes. Raises BadInput."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise BadInput(f"{path}: peft_type is {kind!r}; only LORA adapters are supported")
    _refuse_variants(path, config)
    for key, (fits, words) in TYPES.items():
        if not fits(config.get(key)):
            raise BadInput(f"{path}: '{key}' is {config.get(key)!r}; it must be {words}")
    for key in PATTERNS:
        _refuse_broken(path, key, config.get(key) or {})
    return config


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _by_name(value: Any) -> bool:
    return not value or (isinstance(value, dict) and all(map(_above_zero, value.values())))


def _names(value: Any) -> bool:
    several = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return several or value is None or isinstance(value, str)


PATTERNS = ("rank_pattern", "alpha_pattern")
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("r", "lora_alpha"), (_above_zero, "a number above 0")),
    **dict.fromkeys(PATTERNS, (_by_name, "an object, from module names to numbers above 0")),
    "lora_dropout": (lambda x: not x or (_above_zero(x) and x <= 1), "a number from 0 to 1"),
    "target_modules": (_names, "a name or a list of names"),
    "base_model_name_or_path": (lambda x: x is None or isinstance(x, str), "a name"),
}
"""Key -> whether a value is of its type, and the words for that type."""


def _refuse_broken(path: Path, key: str, pattern: Mapping[str, float]) -> None:
    for name in pattern:
        try:
            re.compile(_ends_in(name))
        except (re.error, RecursionError, OverflowError) as error:
            raise BadInput(
                f"{path}: '{name}' in {key} is not a regular expression ({error}); write the module's name"
            ) from error


def _refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in KNOWN or not value or (key == "bias" and value == "none"):
            continue
        way_out = WAYS_OUT.get(key, f"train it again without {key}")
        raise BadInput(f"{path}: '{key}' is {value!r}, which is not plain LoRA; {way_out}")
    init = config.get("init_lora_weights")
    if init not in PLAIN_INITS:
        raise BadInput(
            f"{path}: init_lora_weights '{init}' changes the base; save the adapter again from PEFT with "
            "path_initial_model_for_weight_conversion"
        )


def pattern_value(pattern: Mapping[str, float] | None, name: str) -> float | None:
    """What PEFT finds for a module: the value of the first key (a regular expression) its name ends in."""
    return next((value for key, value in (pattern or {}).items() if re.match(_ends_in(key), name)), None)


def _ends_in(key: str) -> str:
    return rf"(.*\.)?({key})$"


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r (arXiv 2106.09685 section 4.1), or lora_alpha / sqrt(r) with rsLoRA (2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def plain_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`target_modules` if that list alone selects the modules; empty if it is a pattern or narrowed."""
    targets = config.get("target_modules")
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    return tuple(sorted(targets)) if isinstance(targets, list) and not narrowed else ()
