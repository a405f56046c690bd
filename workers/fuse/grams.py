"""`gram.safetensors` beside an adapter: what its inputs were like, for rule `regmean`.

Module name (as in the base) -> G = X^T X [in_features, in_features], float32 or float64, X the inputs that
the module saw while the adapter was trained, one row a token. The file is optional and no part of the
adapter.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

GRAMS = "gram.safetensors"


def gram_of(folder: Path, module: str) -> torch.Tensor | None:
    """The Gram matrix of one module, read alone to bound memory; None where it is not known."""
    path = folder / GRAMS
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(module) if module in file.keys() else None  # noqa: SIM118 - not a mapping
