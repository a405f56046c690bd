"""`gram.safetensors` beside an adapter: what its inputs were like, for rule `regmean`.

Module name (as in the base) -> G = X^T X [in_features, in_features], float32 or float64 and symmetric, X the
inputs that the module reads from rows that the adapter was trained on, one row a token. A training job leaves
the file beside its adapter if its recipe says `gram_rows`; it is no part of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from workers.manifest import MANIFEST, CorruptFolder, file_digest, read_manifest
from workers.tensors import save_tensors

GRAMS = "gram.safetensors"


def write_grams(grams: Mapping[str, Tensor], folder: Path) -> None:
    """Into an existing folder. Raises OSError."""
    save_tensors({name: gram.contiguous() for name, gram in sorted(grams.items())}, folder / GRAMS)


def gram_of(folder: Path, module: str) -> Tensor | None:
    """The Gram matrix of one module, read alone to bound memory; None where it is not known."""
    path = folder / GRAMS
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(module) if module in file.keys() else None  # noqa: SIM118 - not a mapping


def verify_grams(folder: Path) -> dict[str, str]:
    """{file name: SHA-256}, empty where there is no file. Raises CorruptFolder if a manifest says another."""
    if not (folder / GRAMS).is_file():
        return {}
    digest = file_digest(folder / GRAMS)
    files = read_manifest(folder).get("files", {}) if (folder / MANIFEST).is_file() else None
    if files is not None and files.get(GRAMS, {}).get("sha256") != digest:
        raise CorruptFolder(f"{folder / GRAMS} does not match the digest in {MANIFEST}")
    return {GRAMS: digest}
