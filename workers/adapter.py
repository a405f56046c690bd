"""An adapter as tensors, and its PEFT files: `adapter_config.json` and `adapter_model.safetensors`.

Owns the PEFT layout. Nothing else reads or writes these two files. What PEFT can express and Chorus cannot
compute with is refused here, so that everything behind this file is plain LoRA.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from workers.adapter_config import CONFIG, lora_scaling, pattern_value, plain_targets, read_config
from workers.factor_file import Pair, StoredFactors, keys_of, pair_up
from workers.manifest import MANIFEST, CorruptFolder, file_digest, read_manifest
from workers.shards import not_whole
from workers.tensors import save_tensors
from workers.types import BadInput

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by module name as in the base model (`model.layers.0.self_attn.q_proj`).

    `factors[name] = (A, B)` with A [r, in_features] and B [out_features, r];
    the module adds `scaling(name) * B @ A` to the base weight.
    """

    factors: Mapping[str, Pair]
    """Of an adapter that was opened, read from its file each time."""
    r: int
    lora_alpha: float
    use_rslora: bool = False
    lora_dropout: float = 0.0
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Full module name -> its own lora_alpha."""
    base_model: str = ""
    target_modules: tuple[str, ...] = ()
    """Names that select exactly `factors` on the base (`short_names`); empty for the full names."""

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Full module name -> its rank, for the modules whose factors are not of rank `r`."""
        ranks = {name: a.shape[0] for name, (a, _) in self.described.items()}
        return {name: rank for name, rank in ranks.items() if rank != self.r}

    @property
    def described(self) -> Mapping[str, Pair]:
        """`factors` as far as their dtypes and shapes go: nothing is read."""
        return self.factors.described if isinstance(self.factors, StoredFactors) else self.factors

    def scaling(self, name: str) -> float:
        """What `B @ A` of the module is multiplied by."""
        rank = self.described[name][0].shape[0]
        return lora_scaling(self.alpha_pattern.get(name, self.lora_alpha), rank, self.use_rslora)


def short_names(chosen: Collection[str], every: Collection[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that select exactly `chosen` among `every` module name of the base.

    A last component (`q_proj`) stands for its modules when all that bear it are chosen; others stay full.
    """
    bearers: defaultdict[str, set[str]] = defaultdict(set)
    for name in every:
        bearers[name.rpartition(".")[2]].add(name)
    last = {name: name.rpartition(".")[2] for name in chosen}
    return tuple(sorted({end if bearers[end] <= set(chosen) else name for name, end in last.items()}))


# ---- writing ------------------------------------------------------------------------------------------


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` PEFT writes for the same adapter, reduced to what describes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": _plain(adapter.lora_alpha),
        "lora_dropout": adapter.lora_dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted(adapter.target_modules or adapter.factors),
        "rank_pattern": _anchored(adapter.rank_pattern, adapter.factors),
        "alpha_pattern": _anchored(adapter.alpha_pattern, adapter.factors),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write PEFT's two files into an existing folder. Equal adapters give equal bytes."""
    tensors = {}
    for name, (a, b) in sorted(adapter.factors.items()):
        # Copied: factors may be views of one buffer, which safetensors refuses.
        for key, factor in zip(keys_of(name), (a, b), strict=True):
            tensors[key] = factor.detach().to("cpu", copy=True).contiguous()
    save_tensors(tensors, folder / WEIGHTS)
    write_config(adapter, folder)


def write_config(adapter: Adapter, folder: Path) -> None:
    config = json.dumps(adapter_config(adapter), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(config + "\n")


def _plain(number: float) -> float:
    """16.0 as 16: PEFT and vLLM declare `lora_alpha` an integer."""
    return int(number) if float(number).is_integer() else float(number)


def _anchored(by_name: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    """Keys as PEFT matches them, at the end of a name: anchored where another module's name ends alike."""
    return {
        f"^{name}" if any(other.endswith(f".{name}") for other in names) else name: _plain(value)
        for name, value in sorted(by_name.items())
    }


# ---- reading ------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, in the dtypes stored; verified if a manifest lies beside it.

    Raises BadInput if the folder is not a plain LoRA adapter in safetensors, or its configuration and tensors
    do not agree; CorruptFolder if a byte differs from the manifest.
    """
    _require_files(folder)
    verify_adapter(folder)
    return _adapter(folder, pair_up(folder / WEIGHTS, _read_tensors(folder)))


def open_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, whose factors are read module by module, and are not verified.

    Raises BadInput as `read_adapter` does.
    """
    _require_files(folder)
    return _adapter(folder, StoredFactors(folder / WEIGHTS))


def _adapter(folder: Path, factors: Mapping[str, Pair]) -> Adapter:
    config = read_config(folder / CONFIG)
    adapter = Adapter(
        factors=factors,
        r=int(config["r"]),
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        alpha_pattern=_alphas(config, factors),
        base_model=config.get("base_model_name_or_path") or "",
        target_modules=plain_targets(config),
    )
    _check_ranks(folder / CONFIG, config, adapter.described)
    return adapter


def _alphas(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, float]:
    found = {name: pattern_value(config.get("alpha_pattern"), name) for name in modules}
    return {name: alpha for name, alpha in found.items() if alpha is not None}


def verify_adapter(folder: Path) -> dict[str, str]:
    """`adapter_digests`, checked against the manifest beside the files if there is one.

    Raises CorruptFolder if one differs, BadInput if a file is missing.
    """
    _require_files(folder)
    digests = adapter_digests(folder)
    files = read_manifest(folder).get("files", {}) if (folder / MANIFEST).exists() else None
    for name, digest in digests.items():
        if files is not None and files.get(name, {}).get("sha256") != digest:
            raise CorruptFolder(f"{folder / name} does not match the digest in {MANIFEST}")
    return digests


def adapter_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of PEFT's two files: what the adapter is, wherever it lies."""
    return {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)}


def check_finite(adapter: Adapter, where: str) -> None:
    """Raises BadInput naming the first module with a NaN or an infinity."""
    for name, factors in adapter.factors.items():
        check_finite_factors(name, factors, where)


def check_finite_factors(module: str, factors: Pair, where: str) -> None:
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise BadInput(
            f"{where}: module '{module}' holds NaN or Inf; use a checkpoint from before it diverged"
        )


def _require_files(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{folder} is not an adapter: it has no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder} has no {WEIGHTS}; save it again from PEFT with safe_serialization=True")


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except SafetensorError as error:
        raise not_whole(path, error) from error


def _check_ranks(path: Path, config: Mapping[str, Any], factors: Mapping[str, Pair]) -> None:
    r = int(config["r"])
    for name, (a, _) in factors.items():
        rank = pattern_value(config.get("rank_pattern"), name) or r
        if rank != a.shape[0]:
            raise BadInput(
                f"{path}: module '{name}' should have rank {rank} but its tensors have {a.shape[0]}; "
                "put the true rank into rank_pattern"
            )
