"""A frozen base as a recipe names it: a base file, a model folder, or a hub id already on this machine.

Owns finding the folder and the keys of a base file. Loads no weights, imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationError, model_validator

from orchestrator.recipe.file import Node, Place, read_yaml
from orchestrator.recipe.keys import refusal
from orchestrator.recipe.model_folder import (
    BaseDigests,
    folder_digests,
    linear_shapes,
    read_config,
    tensor_shapes,
)
from orchestrator.recipe.parts import Count, Model, Word, not_bool
from orchestrator.recipe.zero_block import ZeroBlock
from workers.manifest import json_digest
from workers.types import BadInput, BaseSpec

SUFFIXES = (".yaml", ".yml")


def _word(value: object) -> object:
    """YAML reads `zero: 3` as a number."""
    return str(value) if isinstance(value, int) else value


def _budget(value: object) -> object:
    not_bool(value)
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError(f"should be auto or a whole number from 1, found {value!r}")


Budget = Annotated[int | Literal["auto"], BeforeValidator(_budget)]


class BaseFile(Model):
    """The keys of a base file: which model, and how a host holds it."""

    model: Word
    """A folder relative to this file, or a hub id."""
    revision: str | None = None
    """Of a hub id: a commit, tag or branch that is on this machine."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    zero: Annotated[Literal["auto", "none", "3"], BeforeValidator(_word)] = "auto"
    """DeepSpeed ZeRO: 3 spreads the base over the ranks; auto does so when there are several."""
    deepspeed: ZeroBlock = ZeroBlock()
    """DeepSpeed's zero_optimization block."""
    load_in_4bit: bool = False
    """Weights in NF4 by bitsandbytes, on a GPU, not partitioned."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """varlen trains on rows that lie end to end, without padding: for a GPU in bfloat16."""
    activation_checkpointing: bool = False
    """Keep no activations for the backward pass: half as much again to compute, far less to hold."""
    arithmetic: Literal["auto", "exact", "fused"] = "auto"
    """Of the adapters: exact gives plain PEFT's bits, fused is faster; auto is exact on a CPU."""
    world_size: Count = 1
    """Ranks of a host."""
    slots: Count = 8
    """Adapters a host can hold at once."""
    tokens_per_tick: Budget = "auto"
    """Padded tokens one rank does in a tick; auto finds the number on the host's own ticks."""
    chunk_tokens: Count | None = None
    """Padded tokens of one job that a rank does at once; left out, tokens_per_tick, or 4096 with auto."""

    @model_validator(mode="after")
    def _four_bits_are_not_partitioned(self) -> BaseFile:
        if self.load_in_4bit and self.zero != "none":
            raise ValueError("load_in_4bit needs zero: none, for ZeRO-3 cannot partition 4-bit weights")
        return self


@dataclass(frozen=True)
class Base:
    """A base on this machine: how to load it, and what can be said of it without loading."""

    slug: str
    """Names the base in registered names, `<slug>.<task>`."""
    spec: BaseSpec
    world_size: int
    """Ranks of a host, unless a recipe asks for others."""
    digests: BaseDigests
    parameters: int
    max_position_embeddings: int | None
    linears: Mapping[str, tuple[int, int]] = field(repr=False)
    """Module name -> (out_features, in_features) of every linear layer but the output head."""

    @property
    def fingerprint(self) -> str:
        """Digest of all of the base that bears on a score: bytes and precision, not the way it is spread."""
        quantized = {key: value for key, value in self.spec.deepspeed.items() if "quantized" in key}
        if self.spec.load_in_4bit:
            quantized["load_in_4bit"] = True
        return json_digest([asdict(self.digests), self.spec.dtype, quantized])

    def targets(self, target_modules: str | Iterable[str]) -> dict[str, tuple[int, int]]:
        """The linear layers `target_modules` selects, by PEFT's rule: the whole name or its last parts."""
        if isinstance(target_modules, str):
            return dict(self.linears)
        wanted = tuple(target_modules)
        return {
            name: shape
            for name, shape in self.linears.items()
            if any(name == module or name.endswith(f".{module}") for module in wanted)
        }

    def module_names(self) -> list[str]:
        """Last parts of the linear layers' names, as one writes them in `lora_target_modules`."""
        return sorted({name.rpartition(".")[2] for name in self.linears})


def anchor(reference: str, folder: Path) -> str:
    """`reference` with a path made absolute; a hub id stays as it is."""
    beside = os.path.normpath(folder / reference)
    local = reference.endswith(SUFFIXES) or reference.startswith((".", "/")) or Path(beside).is_dir()
    return beside if local else reference


def load_base(reference: str, place: Place, weights: str | None = None) -> Base:
    """The base that an anchored `reference`, written at `place`, names. Raises BadInput.

    With `weights`, the digest they should have, they are not read: who reads them later checks it.
    """
    if reference.endswith(SUFFIXES):
        return _from_file(Path(reference), place, weights)
    return _describe(BaseFile(model=reference), reference, place, Path(reference).name, weights)


def _from_file(path: Path, place: Place, weights: str | None) -> Base:
    if not path.is_file():
        raise BadInput(f"{place}: base_model: no such base file: {path}")
    node = read_yaml(path)
    keys = parse_base_file(node)
    where = node.at(["model"]).place
    model = anchor(keys.model, path.parent)
    if keys.revision is not None and Path(model).is_absolute():
        raise BadInput(f"{node.at(['revision']).place}: a revision belongs to a hub id, not to a folder")
    return _describe(keys, model, where, path.stem, weights)


def _model_folder(model: str, revision: str | None, place: Place) -> Path:
    if not Path(model).is_absolute():
        return _cached(model, revision, place)
    if not Path(model).is_dir():
        raise BadInput(f"{place}: no such model folder: {model}")
    return Path(model)


def parse_base_file(node: Node) -> BaseFile:
    """Raises BadInput naming file, line and key."""
    try:
        node.mapping()
        return BaseFile.model_validate(node.plain())
    except ValidationError as error:
        raise refusal(error, node, BaseFile) from error


def _cached(hub_id: str, revision: str | None, place: Place) -> Path:
    """The folder of a hub id in the local Hugging Face cache; never goes to the network."""
    # Imported here: it takes a quarter of a second, and only hub ids need it.
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise BadInput(
            f"{place}: {hub_id!r} is neither a folder beside the file nor a model in the local Hugging Face "
            f"cache; fetch it with `hf download {hub_id}` or name a folder"
        ) from error


def _describe(keys: BaseFile, model: str, place: Place, name: str, weights: str | None) -> Base:
    folder = _model_folder(model, keys.revision, place).resolve()
    config = read_config(folder, place)
    shapes = tensor_shapes(folder, place)
    digests = folder_digests(folder, place, weights)
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower())
    held = keys.model_dump(exclude={"model", "revision", "world_size", "deepspeed"})
    return Base(
        slug=slug,
        spec=BaseSpec(
            path=str(folder),
            name=slug if Path(model).is_absolute() else model,
            digest=digests.all,
            deepspeed=keys.deepspeed.given(),
            **held,
        ),
        world_size=keys.world_size,
        digests=digests,
        parameters=sum(prod(shape) for shape in shapes.values()),
        max_position_embeddings=_longest(config),
        linears=linear_shapes(shapes),
    )


def _longest(config: dict[str, Any]) -> int | None:
    """Of a model of several parts the text part says it, as `workers.rows.longest_row` reads it."""
    text: dict[str, Any] | None = config.get("text_config")
    return (text or config).get("max_position_embeddings")
