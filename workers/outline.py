"""What an adapter folder holds, read without torch: ranks, scales, shapes, whether all numbers are finite.

For those who judge an adapter and do not compute with it. Reads safetensors by its header (8 bytes of length,
then JSON: dtype, shape and place of each tensor). `workers.adapter` reads the same files as tensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.adapter_config import CONFIG, lora_scaling, pattern_value, read_config
from workers.types import BadInput

WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "BF16": 0xFF << 7, "F16": 0x1F << 10}
"""Bits that are all set in a NaN or an infinity, and in nothing else (IEEE 754)."""
READ_AT_ONCE = 1 << 24
LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """An adapter as a judge sees it; the fields after `problem` are empty where it is not loadable."""

    problem: str = ""
    """Why it is not plain LoRA in two whole files, in words; empty if it is."""
    r: int = 0
    lora_alpha: float = 0.0
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    """Module -> rank of its factors."""
    scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Module -> what PEFT multiplies B A by."""
    shapes: Mapping[str, Shape] = field(default_factory=dict[str, Shape])
    """Module -> (out_features, in_features)."""
    not_finite: str = ""
    """The first tensor with a NaN or an infinity."""


def outline(folder: Path) -> Outline:
    """Never raises for what the files hold: that is what is judged."""
    try:
        config = read_config(folder / CONFIG)
        entries, begin = read_header(folder / WEIGHTS)
        factors = _paired(entries)
        ranks = {name: pair["A"][0] for name, pair in factors.items()}
        _check_ranks(config, ranks)
        return Outline(
            r=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora")),
            ranks=ranks,
            scales={name: _scale(config, name, rank) for name, rank in ranks.items()},
            shapes={name: (pair["B"][0], pair["A"][1]) for name, pair in factors.items()},
            not_finite=next(_not_finite(folder / WEIGHTS, entries, begin), ""),
        )
    except (BadInput, OSError) as error:
        return Outline(problem=str(error).replace(f"{folder}/", ""))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor -> its dtype, shape and place; where the bytes begin. Raises BadInput, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise BadInput(f"{path} is not a whole safetensors file; copy or save it again")
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise BadInput(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise BadInput(f"{path} is not a safetensors file: its header is no object")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise BadInput(f"{path} is not a safetensors file: its header does not say where '{name}' lies")
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != 8 + length + end:
        raise BadInput(f"{path} is not a whole safetensors file; copy or save it again")
    return entries, 8 + length


def _is_entry(entry: Any) -> bool:
    def whole(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(x, int) and x >= 0 for x in value)

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    offsets = entry.get("data_offsets")
    return whole(entry.get("shape")) and whole(offsets) and len(offsets) == 2


def base_shapes(folder: Path) -> dict[str, Shape]:
    """Module -> shape of its weight, of every matrix of a model folder. Raises BadInput, OSError."""
    found: dict[str, Shape] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries, _ = read_header(path)
        found |= {
            name.removesuffix(".weight"): tuple(entry["shape"])
            for name, entry in entries.items()
            if name.endswith(".weight") and len(entry["shape"]) == 2
        }
    return found


def served_scale(server: str, lora_alpha: float, r: int, rank: int, use_rslora: bool) -> float:
    """What a server multiplies a module of that rank by, whatever patterns say (`workers.servers`)."""
    if server == "vLLM" and use_rslora:
        return lora_alpha / math.sqrt(r)
    return lora_alpha / (rank if server == "llama.cpp" else r)


def _paired(entries: Mapping[str, Any]) -> dict[str, dict[str, Shape]]:
    """Module -> shapes of its A and B."""
    sides: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for key, entry in entries.items():
        match = FACTOR.fullmatch(key)
        if match is None or len(entry["shape"]) != 2 or entry["dtype"] not in WIDTHS:
            raise BadInput(
                f"tensor '{key}' ({entry['dtype']} {entry['shape']}) is no factor of a linear layer"
            )
        first, last = entry["data_offsets"]
        if last - first != WIDTHS[entry["dtype"]] * math.prod(entry["shape"]):
            raise BadInput(f"tensor '{key}' ({entry['dtype']} {entry['shape']}) has {last - first} bytes")
        sides[match[1]][match[2]] = tuple(entry["shape"])
    if not sides:
        raise BadInput(f"{WEIGHTS} holds no tensor")
    for name, pair in sides.items():
        if len(pair) != 2 or pair["A"][0] != pair["B"][1]:
            raise BadInput(f"lora_A and lora_B of module '{name}' do not pair up")
    return dict(sides)


def _check_ranks(config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    for name, rank in ranks.items():
        said = pattern_value(config.get("rank_pattern"), name) or int(config["r"])
        if said != rank:
            raise BadInput(f"module '{name}' should have rank {said} but its tensors have {rank}")


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = pattern_value(config.get("alpha_pattern"), name) or float(config["lora_alpha"])
    return lora_scaling(alpha, rank, bool(config.get("use_rslora")))


def _not_finite(path: Path, entries: Mapping[str, Any], begin: int) -> Iterator[str]:
    import numpy as np

    with path.open("rb") as file:
        for name, entry in entries.items():
            bits = np.dtype(f"<u{WIDTHS[entry['dtype']]}")
            exponent = bits.type(EXPONENTS[entry["dtype"]])
            first, last = entry["data_offsets"]
            file.seek(begin + first)
            for start in range(first, last, READ_AT_ONCE):
                piece = np.frombuffer(file.read(min(READ_AT_ONCE, last - start)), bits)
                if ((piece & exponent) == exponent).any():
                    yield name
                    break
