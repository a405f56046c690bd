"""A release folder: an adapter's PEFT files as they are, or a full model with the adapter merged in.

Owns what lies in such a folder. The merge is `workers.merge`'s, publishing `workers.manifest`'s.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workers.adapter import (
    WEIGHTS,
    Adapter,
    adapter_digests,
    check_finite,
    read_adapter,
    write_adapter,
)
from workers.adapter_config import CONFIG
from workers.bom import BOM, bill_of_materials
from workers.fuse.report import REPORT
from workers.manifest import (
    MANIFEST,
    SIGNATURE,
    CorruptFolder,
    file_digest,
    folder_files,
    json_digest,
    publish_folder,
    read_manifest,
    verify_folder,
)
from workers.merge import BASE_CONFIG, check_fit, weight_map, write_merged
from workers.progress import Tell, silent
from workers.release_card import CARD, release_card
from workers.servers import (
    BASE_VARIABLE,
    MOST,
    Obstacle,
    base_of_card,
    commands,
    highest_rank,
    lost,
    obstacles,
    repaired,
    vllm_rank,
)
from workers.signature import check_key, sign
from workers.types import BadInput, ExportTask

MODEL_FILES = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""What a merged model takes over from its base, where it is there. Code is not among it."""

ADAPTER_FILES = (CONFIG, WEIGHTS, REPORT)


def export(task: ExportTask, tell: Tell = silent) -> dict[str, Any]:
    """Publish `task.out_dir` with a manifest and return {"out_dir", "merged", "files": name -> SHA-256}.

    Also `obstacles`: {"server", "words", "repairable"} for each server that would not serve it, `commands`
    that serve it on this machine, by server, and `lost`, the share of the adapter that a lower rank took.
    Doing it again where the same release is there changes nothing. Raises BadInput for an adapter that does
    not fit the base, NaN or Inf in it, a key that cannot sign, or an `out_dir` that holds something else;
    CorruptFolder if a byte of the adapter differs from its manifest. After any error no folder is left.
    """
    source, base, out = Path(task.adapter_dir), Path(task.base_path), Path(task.out_dir)
    _check_extra_names(task)
    if task.repair and task.merged:
        raise BadInput("a merged model has no adapter to repair")
    if task.signing_key:
        check_key(Path(task.signing_key))
    adapter = scored = read_adapter(source)
    check_finite(adapter, task.adapter_dir)
    check_fit(adapter, base)
    fresh = not out.exists()
    contents = _contents(task) if fresh else _contents(task) | _base_files(task)
    if task.repair:
        adapter = repaired(scored)
    found = [] if task.merged else obstacles(adapter, base)
    if fresh:
        known: dict[str, str] = {}
        with publish_folder(out, contents, known) as scratch:
            contents |= _write_weights(task, adapter, scratch, known, tell)
            _write_documents(task, adapter, found, scratch)
            known |= {name: entry["sha256"] for name, entry in folder_files(scratch, known).items()}
            (scratch / BOM).write_text(_bill(task, contents, known))
    published = _published(out, contents, fresh)
    if task.signing_key and not (out / SIGNATURE).is_file():
        _sign(out, Path(task.signing_key), fresh)
    return published | {
        "obstacles": [asdict(obstacle) for obstacle in found],
        "lost": lost(scored, adapter) if highest_rank(scored) > MOST and task.repair else 0.0,
        "commands": _commands(task, adapter, shlex.quote(_base_here(task, adapter))),
    }


def _sign(out: Path, key: Path, fresh: bool) -> None:
    try:
        sign(out, key)
    except BaseException:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _write_weights(
    task: ExportTask, adapter: Adapter, out: Path, known: dict[str, str], tell: Tell
) -> dict[str, Any]:
    """What the manifest also has to say: which bytes of the base a merged model was made from."""
    base = Path(task.base_path)
    if task.merged:
        hash_base = bool(task.base_weights) or not task.base_digest
        merged = write_merged(adapter, base, out, getattr(torch, task.dtype), hash_base, tell)
        if task.base_weights and json_digest(dict(merged.base_files)) != task.base_weights:
            raise BadInput(f"{base} is not the base the adapter was trained on: its weights' digest differs")
        known |= merged.files
        _copy_present(base, out, MODEL_FILES)
        return {} if task.base_digest else {"base_files": dict(merged.base_files)}
    if task.repair:
        write_adapter(adapter, out)
        _copy_present(Path(task.adapter_dir), out, (REPORT,))
    else:
        _copy_present(Path(task.adapter_dir), out, ADAPTER_FILES)
    return {}


def _write_documents(task: ExportTask, adapter: Adapter, found: Sequence[Obstacle], out: Path) -> None:
    served_by = _commands(task, adapter, base_of_card(adapter.base_model))
    dtype = task.dtype if task.merged else None
    for name, text in task.extra_files:
        (out / name).write_text(release_card(text, served_by, found, dtype) if name == CARD else text)


def _commands(task: ExportTask, adapter: Adapter, base: str) -> dict[str, str]:
    name = task.name.partition("/")[0] or Path(task.out_dir).name
    return commands(name, base, task.merged, vllm_rank(adapter))


def _base_here(task: ExportTask, adapter: Adapter) -> str:
    """A hub id if the adapter names one, else the folder in which the base lies on this machine."""
    named = adapter.base_model
    return task.base_path if base_of_card(named) == BASE_VARIABLE else named


def _bill(task: ExportTask, contents: Mapping[str, Any], files: Mapping[str, str]) -> str:
    card = dict(task.extra_files).get(CARD, "")
    properties = {f"adapter:{name}": digest for name, digest in contents["adapter"].items()}
    properties |= {"base": contents.get("base_digest", ""), "merged": str(task.merged).lower()}
    name, _, version = task.name.partition("/")
    return bill_of_materials(name or "adapter", version or "0", files, properties, card)


def _contents(task: ExportTask) -> dict[str, Any]:
    """What the release is made of, kept in its manifest: equal releases say the same, wherever they lie."""
    source = Path(task.adapter_dir)
    contents: dict[str, Any] = {
        "adapter": adapter_digests(source),
        "merged": task.merged,
        "repaired": task.repair,
        "extra_files": json_digest(sorted(task.extra_files)),
    }
    if task.base_digest:
        contents["base_digest"] = task.base_digest
    elif (source / MANIFEST).is_file() and (digest := read_manifest(source).get("base_digest")):
        contents["base_digest"] = digest
    if task.merged:
        contents["dtype"] = task.dtype
    return contents


def _base_files(task: ExportTask) -> dict[str, Any]:
    """As `_write_weights` says it: nothing where the base is named by its digest."""
    if not task.merged or task.base_digest:
        return {}
    base = Path(task.base_path)
    files = [base / BASE_CONFIG, *sorted(set(weight_map(base).values()))]
    return {"base_files": {path.name: file_digest(path) for path in files}}


def _copy_present(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_extra_names(task: ExportTask) -> None:
    """An extra file must neither leave the folder nor take the place of one that the release is made of."""
    own = {CONFIG, WEIGHTS, REPORT, MANIFEST, SIGNATURE, BOM, BASE_CONFIG, *MODEL_FILES}
    for name, _ in task.extra_files:
        if name != Path(name).name or name in own or name.endswith((".safetensors", ".index.json")):
            raise BadInput(
                f"extra file '{name}' cannot be put into a release; give it another plain file name"
            )


def _published(out: Path, contents: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What lies in `out`. Bytes that were hashed on their way to the disk are not read again."""
    manifest: dict[str, Any] = {}
    with suppress(CorruptFolder):
        manifest = read_manifest(out)
    if any(manifest.get(key) != value for key, value in contents.items()):
        raise BadInput(f"{out} exists and is not this release; give another folder or remove it")
    files = (manifest if fresh else verify_folder(out))["files"]
    digests = {name: entry["sha256"] for name, entry in files.items()}
    return {"out_dir": str(out), "merged": contents["merged"], "files": digests}
