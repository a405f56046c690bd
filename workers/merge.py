"""An adapter merged into its base's weights: W + scaling * B A, one tensor in memory at a time.

Owns the layout of a base's safetensors files. Builds no model; the base folder is only read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from workers.adapter import Adapter
from workers.shards import DTYPES, Entry, write_shard
from workers.types import BadInput

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE_CONFIG = "config.json"
FLOATS = ("F64", "F32", "BF16", "F16")
ROWS_AT_ONCE = 1 << 24
"""Elements of a weight that are widened at once: bounds what arithmetic adds to a tensor's own memory."""


def weight_map(base: Path) -> dict[str, Path]:
    """Tensor name -> the shard that holds it. Raises BadInput if the base is not whole or not safetensors."""
    if (base / INDEX).is_file():
        shards: dict[str, str] = json.loads((base / INDEX).read_text())["weight_map"]
        found = {name: base / shard for name, shard in shards.items()}
    elif (base / SINGLE).is_file():
        with safe_open(base / SINGLE, "pt") as shard:
            found = dict.fromkeys(shard.keys(), base / SINGLE)
    else:
        raise BadInput(f"{base} holds no {SINGLE}; save the base with safe_serialization=True")
    for path in sorted(set(found.values())):
        if not path.is_file():
            raise BadInput(f"{path} is missing; copy or download the base again")
    return found


def check_fit(adapter: Adapter, base: Path) -> None:
    """Raises BadInput naming the first module that the base does not have, or has in another shape.

    A server may load such an adapter without a word and serve the base.
    """
    shards = weight_map(base)
    for module, (a, b) in adapter.factors.items():
        weight = _source(module, shards, base)
        with safe_open(shards[weight], "pt") as shard:
            piece = shard.get_slice(weight)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
        if shape != (b.shape[0], a.shape[1]):
            raise BadInput(
                f"module '{module}' is {b.shape[0]} x {a.shape[1]} in the adapter but its weight is "
                f"{' x '.join(map(str, shape))} in {base}; was it trained on another base?"
            )
        if dtype not in FLOATS:
            raise BadInput(
                f"{base}: weight '{weight}' is stored as {dtype}; merge into the base not quantised"
            )


def write_merged(adapter: Adapter, base: Path, out: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write the merged weights, their index and `config.json` into `out`, floating weights in `dtype`.

    File name -> SHA-256 of the weights' files, which are cut as the base's are. An output head that shares
    the embedding's weight gets its own where the adapter changes it.
    """
    shards = weight_map(base)
    sources = {f"{module}.weight": _source(module, shards, base) for module in adapter.factors}
    digests: dict[str, str] = {}
    placed: dict[str, str] = {}
    size = 0
    for path in sorted(set(shards.values())):
        entries = _entries(path, sources, dtype)
        merged = partial(_merged_tensor, adapter, sources, path, dtype)
        digests[path.name] = write_shard(out / path.name, entries, merged)
        placed |= dict.fromkeys(entries, path.name)
        size += sum(entry.nbytes for entry in entries.values())
    if (base / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    tied = tied_head(base)
    _write_config(base, out, dtype, untie=tied is not None and tied[0] in sources)
    return digests


def _entries(path: Path, sources: Mapping[str, str], dtype: torch.dtype) -> dict[str, Entry]:
    """The tensors of one shard, and of the modules that start from a tensor in it under another name."""
    with safe_open(path, "pt") as shard:
        names = set(shard.keys())
        names |= {weight for weight, source in sources.items() if source in names}
        pieces = {name: shard.get_slice(sources.get(name, name)) for name in sorted(names)}
        stored = {name: (piece.get_shape(), DTYPES[piece.get_dtype()]) for name, piece in pieces.items()}
    return {
        name: Entry(tuple(shape), dtype if kind.is_floating_point else kind)
        for name, (shape, kind) in stored.items()
    }


def _merged_tensor(
    adapter: Adapter, sources: Mapping[str, str], path: Path, dtype: torch.dtype, name: str
) -> Tensor:
    """One tensor; the file is opened anew for each, so that no more of it than that stays in memory."""
    with safe_open(path, "pt") as shard:
        return _merged(adapter, name, shard.get_tensor(sources.get(name, name)), dtype)


def _merged(adapter: Adapter, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    module = name.removesuffix(".weight")
    if not weight.is_floating_point():
        return weight
    if module not in adapter.factors:
        return weight.to(dtype)
    # Added in float32 at least and rounded once: bf16 arithmetic would lose most of a small delta.
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (factor.to(wide) for factor in adapter.factors[module])
    a = adapter.scaling(module) * a
    merged = torch.empty(weight.shape, dtype=dtype)
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        merged[part] = torch.addmm(weight[part].to(wide), b[part], a)
    return merged


def _source(module: str, shards: Mapping[str, Path], base: Path) -> str:
    """The stored weight that `module` computes with on the base."""
    weight = f"{module}.weight"
    if weight in shards:
        return weight
    tied = tied_head(base)
    if tied is None or tied[0] != weight or tied[1] not in shards:
        raise BadInput(f"module '{module}' of the adapter is not in {base}; was it trained on another base?")
    return tied[1]


def tied_head(base: Path) -> tuple[str, str] | None:
    """(weight of the output head, weight of the embedding) if the base shares one between them."""
    config = AutoConfig.from_pretrained(base)
    if not config.tie_word_embeddings:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {part: name for name, part in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names[head]}.weight", f"{names[embedding]}.weight"


def _write_config(base: Path, out: Path, dtype: torch.dtype, untie: bool) -> None:
    config = json.loads((base / BASE_CONFIG).read_text())
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    if untie:
        config["tie_word_embeddings"] = False
    (out / BASE_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
