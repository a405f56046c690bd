"""An adapter merged into its base's weights: W + scaling * B A, some blocks in memory at a time.

Owns the layout of a base's safetensors files. Builds no model; the base folder is only read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from workers.adapter import Adapter
from workers.fuse.basis import one_thread
from workers.manifest import file_digest
from workers.progress import Tell, silent
from workers.shards import Block, Entry, StoredShard, stored_entries, write_shard
from workers.types import BadInput

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE_CONFIG = "config.json"
FLOATS = ("F64", "F32", "BF16", "F16")
ELEMENTS_AT_ONCE = 1 << 18
"""Of a weight, widened at once: 1 MiB stays in the processor's cache, 64 MiB take 3.5 times as long."""


def weight_map(base: Path) -> dict[str, Path]:
    """Tensor name -> the shard that holds it. Raises BadInput if the base is not whole or not safetensors."""
    if (base / INDEX).is_file():
        found = {name: base / shard for name, shard in _index(base / INDEX).items()}
    elif (base / SINGLE).is_file():
        found = dict.fromkeys(stored_entries(base / SINGLE), base / SINGLE)
    else:
        raise BadInput(f"{base} holds no {SINGLE}; save the base with safe_serialization=True")
    for path in sorted(set(found.values())):
        if not path.is_file():
            raise BadInput(f"{path} is missing; copy or download the base again")
    return found


def _index(path: Path) -> dict[str, str]:
    try:
        shards = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        shards = None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise BadInput(f"{path} does not say which file holds which weight; copy or download the base again")
    return shards


def check_fit(adapter: Adapter, base: Path) -> None:
    """Raises BadInput naming the first module that the base does not have, or has in another shape.

    A server may load such an adapter without a word and serve the base.
    """
    shards = weight_map(base)
    sources = {module: _source(module, shards, base) for module in adapter.factors}
    stored = {path: stored_entries(path) for path in {shards[weight] for weight in sources.values()}}
    for module, (a, b) in adapter.factors.items():
        weight = sources[module]
        path = shards[weight]
        if weight not in stored[path]:
            raise BadInput(f"{path} lacks '{weight}', which {INDEX} names; copy or download the base again")
        dtype, shape = stored[path][weight]
        if shape != (b.shape[0], a.shape[1]):
            raise BadInput(
                f"module '{module}' is {b.shape[0]} x {a.shape[1]} in the adapter but its weight is "
                f"{' x '.join(map(str, shape))} in {base}; was it trained on another base?"
            )
        if dtype not in FLOATS:
            raise BadInput(
                f"{base}: weight '{weight}' is stored as {dtype}; merge into the base not quantised"
            )


@dataclass(frozen=True)
class Merged:
    """File name -> SHA-256."""

    files: Mapping[str, str]
    """The weights' files, cut as the base's are."""
    base_files: Mapping[str, str]
    """What they were made from, and the base's configuration; empty unless asked for."""


def write_merged(
    adapter: Adapter, base: Path, out: Path, dtype: torch.dtype, hash_base: bool, tell: Tell = silent
) -> Merged:
    """Write the merged weights, their index and `config.json` into `out`, floating weights in `dtype`.

    An output head that shares the embedding's weight gets its own where the adapter changes it. With
    `hash_base` a thread of its own hashes each file while it is merged, from the system's cache. `tell`
    hears of files written.
    """
    shards = weight_map(base)
    sources = {f"{module}.weight": _source(module, shards, base) for module in adapter.factors}
    files: dict[str, str] = {}
    base_files = {BASE_CONFIG: file_digest(base / BASE_CONFIG)} if hash_base else {}
    placed: dict[str, str] = {}
    size = 0
    paths = sorted(set(shards.values()))
    for path in paths:
        with StoredShard(path) as stored, one_thread(), ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(file_digest, path) if hash_base else None
            entries = _entries(stored.entries, sources, dtype)
            filled = partial(_fill, adapter, sources, stored)
            files[path.name] = write_shard(out / path.name, entries, filled)
            if hashed is not None:
                base_files[path.name] = hashed.result()
        placed |= dict.fromkeys(entries, path.name)
        size += sum(entry.nbytes for entry in entries.values())
        tell(len(files), len(paths))
    if (base / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    tied = tied_head(base)
    _write_config(base, out, dtype, untie=tied is not None and tied[0] in sources)
    return Merged(files, base_files)


def _entries(stored: Mapping[str, Entry], sources: Mapping[str, str], dtype: torch.dtype) -> dict[str, Entry]:
    """The tensors of one shard, and of the modules that start from a tensor in it under another name."""
    names = stored.keys() | {weight for weight, source in sources.items() if source in stored}
    found: dict[str, Entry] = {}
    for name in sorted(names):
        kept = stored[sources.get(name, name)]
        kind = dtype if kept.dtype.is_floating_point else kept.dtype
        together = _rows_at_once(kept.shape[1]) * kept.shape[1] if name in sources else 1
        found[name] = Entry(kept.shape, kind, together)
    return found


def _fill(
    adapter: Adapter, sources: Mapping[str, str], stored: StoredShard, block: Block, into: Tensor
) -> None:
    """Elements of one tensor of the release: the base's, or with the adapter added."""
    source = sources.get(block.name, block.name)
    entry = stored.entries[source]
    read = into if entry.dtype == into.dtype else torch.empty(block.elements, dtype=entry.dtype)
    stored.read(source, block.start, read)
    if block.name in sources:
        columns = entry.shape[1]
        first = block.start // columns
        _merge(
            adapter, block.name.removesuffix(".weight"), first, read.view(-1, columns), into.view(-1, columns)
        )
    elif read is not into:
        into.copy_(read)


def _merge(adapter: Adapter, module: str, first: int, weight: Tensor, into: Tensor) -> None:
    """Rows of a module's weight from row `first` on, [rows, in], with scaling * B A added, into `into`.

    Added in float32 at least and rounded once: bf16 arithmetic would lose most of a small delta. `into` may
    be the weight itself.
    """
    wide = torch.promote_types(into.dtype, torch.float32)
    a, b = (factor.to(wide) for factor in adapter.factors[module])
    a = adapter.scaling(module) * a
    rows = _rows_at_once(weight.shape[1])
    scratch = torch.empty((rows, weight.shape[1]), dtype=wide)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        total = scratch[: len(part)].copy_(part)
        into[start : start + rows] = total.addmm_(b[first + start : first + start + len(part)], a)


def _rows_at_once(columns: int) -> int:
    return max(1, ELEMENTS_AT_ONCE // columns)


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
    # Here: a release of the adapter alone has no use for it.
    from transformers import AutoConfig, AutoModelForCausalLM

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
