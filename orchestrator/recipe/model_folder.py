"""What a model's folder says without loading it: shapes from safetensors headers, and digests.

Reads Hugging Face layout with the standard library; knows no recipe.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.recipe.file import Place
from workers.manifest import file_digest, json_digest
from workers.types import BadInput

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
OUTPUT_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class BaseDigests:
    """SHA-256 of what an adapter is bound to."""

    weights: str
    """Over config.json and every safetensors file."""
    tokenizer: str
    chat_template: str
    """Of the template's text, wherever it is stored."""

    @property
    def all(self) -> str:
        """One digest over the three."""
        return json_digest([self.weights, self.tokenizer, self.chat_template])


def read_config(folder: Path, place: Place) -> dict[str, Any]:
    """The model's config.json. Raises BadInput."""
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{place}: {folder} holds no {CONFIG}, so it is not a model")
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable JSON: {error}") from error


# ---- shapes ---------------------------------------------------------------------------------------------


def tensor_shapes(folder: Path, place: Place) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape from the headers of every safetensors file of the model. Raises BadInput."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder, place):
        header = _header(file)
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def weight_files(folder: Path, place: Place) -> list[Path]:
    """The model's safetensors files, in order of name. Raises BadInput if one is missing."""
    index = folder / INDEX
    if index.is_file():
        names = set(_read_json(index)["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise BadInput(f"{place}: {file} is missing; weights are read from safetensors only")
    return files


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file begins with the length of its JSON header, little-endian in 8 bytes."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            return json.loads(stream.read(length))
    except (struct.error, ValueError) as error:
        raise BadInput(f"{file}: not a safetensors file: {error}") from error


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Linear layer -> (out_features, in_features), without the output head, as PEFT's `all-linear` has it."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in sorted(shapes.items())
        if name.endswith(".weight") and len(shape) == 2 and not _is_vocabulary(name)
    }


def _is_vocabulary(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return "embed" in module or module in ("wte", "wpe", *OUTPUT_HEADS)


# ---- digests --------------------------------------------------------------------------------------------


def folder_digests(folder: Path, place: Place, weights: str | None = None) -> BaseDigests:
    """Digests of weights, tokenizer and chat template. Raises BadInput if one of them is absent.

    `weights` is taken for that of the weights where whoever asks has them checked when they are read.
    """
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not tokenizer:
        raise BadInput(f"{place}: {folder} holds no tokenizer.json")
    files = [folder / CONFIG, *weight_files(folder, place)]
    return BaseDigests(
        weights=weights or _digest_of(files),
        tokenizer=_digest_of(tokenizer),
        chat_template=json_digest(_chat_template(folder, place)),
    )


def _chat_template(folder: Path, place: Place) -> object:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text()
    settings = folder / TOKENIZER_CONFIG
    template = _read_json(settings).get("chat_template") if settings.is_file() else None
    if not template:
        raise BadInput(f"{place}: {folder} has no chat template; put one into {TEMPLATE}")
    return template


def _digest_of(files: Iterable[Path]) -> str:
    return json_digest({file.name: _file_digest(file, file.stat().st_mtime_ns) for file in files})


@lru_cache(maxsize=4096)
def _file_digest(file: Path, _modified_ns: int) -> str:
    """Remembered for the life of the process: several jobs name one base, and its weights are large."""
    return file_digest(file)
