"""`adapter_model.safetensors` module by module: memory holds the factors at hand, not the whole file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from workers.shards import dtype_of, stored_entries, write_growing
from workers.types import BadInput

PREFIX = "base_model.model."
READ = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
ENTRY_BYTES = 128
"""Most that a tensor takes in the file's header, beside its name."""

Pair = tuple[Tensor, Tensor]
"""A [r, in_features] and B [out_features, r] of one module."""


def keys_of(module: str) -> tuple[str, str]:
    """The names of A and B in PEFT's files."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


class StoredFactors(Mapping[str, Pair]):
    """Module name -> (A, B), read from the disk each time it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput if the file is not whole, or holds anything but pairs of factors."""
        self._path = path
        self.described = pair_up(path, _described(path))
        """The same on the meta device: dtypes and shapes without values."""

    def __getitem__(self, module: str) -> Pair:
        if module not in self.described:
            raise KeyError(module)
        # Opened each time: pages of a file that stays mapped count as this process's memory.
        with safe_open(self._path, "pt") as file:
            a, b = (file.get_tensor(key) for key in keys_of(module))
        return a, b

    def __contains__(self, module: object) -> bool:
        return module in self.described

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


def pair_up(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Module name -> (A, B). Refuses what does not pair up: another kind of tensor would be lost silently."""
    sides: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2 or tensor.dtype not in READ:
            shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise BadInput(
                f"{path}: tensor '{key}' ({shape}) is not a factor of a linear layer; retrain without it"
            )
        sides[match[1]][match[2]] = tensor
    if not sides:
        raise BadInput(f"{path} holds no tensor; train the adapter with target_modules that match the base")
    for name, pair in sides.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise BadInput(
                f"{path}: lora_A and lora_B of module '{name}' do not pair up; save the adapter again"
            )
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def write_factors(path: Path, modules: Sequence[str], factors: Iterable[tuple[str, Pair]]) -> None:
    """Write the factors of `modules` as they come; equal ones in the same order give equal bytes.

    Raises OSError naming the file if it cannot be written whole.
    """
    names = (json.dumps(key) for module in modules for key in keys_of(module))
    room = sum(len(name) + ENTRY_BYTES for name in names)
    tensors = (item for module, pair in factors for item in zip(keys_of(module), pair, strict=True))
    write_growing(path, room, tensors)


def _described(path: Path) -> dict[str, Tensor]:
    return {
        key: torch.empty(shape, dtype=dtype_of(path, key, code), device="meta")
        for key, (code, shape) in stored_entries(path).items()
    }
