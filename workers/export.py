"""A release folder: an adapter's PEFT files as they are, or a full model with the adapter merged in.

Owns what lies in such a folder. The merge is `workers.merge`'s, publishing `workers.manifest`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workers.adapter import WEIGHTS, adapter_digests, check_finite, read_adapter
from workers.adapter_config import CONFIG
from workers.fuse.report import REPORT
from workers.manifest import MANIFEST, file_digest, json_digest, publish_folder, read_manifest, verify_folder
from workers.merge import BASE_CONFIG, check_fit, weight_map, write_merged
from workers.types import BadInput, ExportTask

MODEL_FILES = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""What a merged model takes over from its base, where it is there. Code is not among it."""

ADAPTER_FILES = (CONFIG, WEIGHTS, REPORT)


def export(task: ExportTask) -> dict[str, Any]:
    """Publish `task.out_dir` with a manifest and return {"out_dir", "merged", "files": name -> SHA-256}.

    Doing it again where the same release is there changes nothing. Raises BadInput for an adapter that does
    not fit the base, NaN or Inf in it, or an `out_dir` that holds something else; CorruptFolder if a byte of
    the adapter differs from its manifest. After any error no folder is left behind.
    """
    source, base, out = Path(task.adapter_dir), Path(task.base_path), Path(task.out_dir)
    _check_extra_names(task)
    adapter = read_adapter(source)
    check_finite(adapter, task.adapter_dir)
    check_fit(adapter, base)
    contents = _contents(task)
    if not out.exists():
        with publish_folder(out, contents) as scratch:
            if task.merged:
                write_merged(adapter, base, scratch, getattr(torch, task.dtype))
                _copy_present(base, scratch, MODEL_FILES)
            else:
                _copy_present(source, scratch, ADAPTER_FILES)
            for name, text in task.extra_files:
                (scratch / name).write_text(text)
    return _published(out, contents)


def _contents(task: ExportTask) -> dict[str, Any]:
    """What the release is made of, kept in its manifest: equal releases say the same, wherever they lie."""
    source, base = Path(task.adapter_dir), Path(task.base_path)
    contents: dict[str, Any] = {
        "adapter": adapter_digests(source),
        "merged": task.merged,
        "extra_files": json_digest(sorted(task.extra_files)),
    }
    if task.merged:
        shards = {path.name: file_digest(path) for path in sorted(set(weight_map(base).values()))}
        contents |= {"dtype": task.dtype, "base_files": shards | _digest(base / BASE_CONFIG)}
    if (source / MANIFEST).is_file() and (digest := read_manifest(source).get("base_digest")):
        contents["base_digest"] = digest
    return contents


def _digest(path: Path) -> dict[str, str]:
    return {path.name: file_digest(path)}


def _copy_present(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_extra_names(task: ExportTask) -> None:
    """An extra file must neither leave the folder nor take the place of one that the release is made of."""
    own = {CONFIG, WEIGHTS, REPORT, MANIFEST, BASE_CONFIG, *MODEL_FILES}
    for name, _ in task.extra_files:
        if name != Path(name).name or name in own or name.endswith((".safetensors", ".index.json")):
            raise BadInput(
                f"extra file '{name}' cannot be put into a release; give it another plain file name"
            )


def _published(out: Path, contents: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else {}
    if any(manifest.get(key) != value for key, value in contents.items()):
        raise BadInput(f"{out} exists and is not this release; give another folder or remove it")
    files = verify_folder(out)["files"]
    digests = {name: entry["sha256"] for name, entry in files.items()}
    return {"out_dir": str(out), "merged": contents["merged"], "files": digests}
