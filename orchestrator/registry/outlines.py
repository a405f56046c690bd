"""A version's files as structural gates see them. Imports no mlflow: any registry gives them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from orchestrator.contracts import AdapterVersion, Registry, RegistryConflict
from orchestrator.structure import Structure
from workers.outline import Outline, base_shapes, outline
from workers.types import BadInput


def structure_of(registry: Registry, version: AdapterVersion, base: Path | None) -> Structure:
    """Of the registered bytes, verified; `base` is the base's model folder, None where it is not known."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = registry.download(version, Path(scratch) / "adapter")
        except RegistryConflict as error:
            return Structure(Outline(problem="its bytes were altered"), str(error))
        return structure_in(folder, base)


def structure_in(folder: Path, base: Path | None) -> Structure:
    """Of a folder whose digest was checked."""
    return Structure(outline(folder), base=None if base is None else _shapes(base))


def _shapes(base: Path) -> dict[str, tuple[int, ...]] | None:
    """None if the folder is gone, or holds no safetensors."""
    try:
        return base_shapes(base) or None
    except (BadInput, OSError):
        return None
