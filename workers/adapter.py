"""An adapter as tensors, and its PEFT files: `adapter_config.json` and `adapter_model.safetensors`.

Owns the PEFT layout. Nothing else reads or writes these two files. What PEFT can express and Chorus cannot
compute with is refused here, so that everything behind this file is plain LoRA.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from workers.adapter_config import CONFIG, pattern_value, plain_targets, read_config
from workers.manifest import MANIFEST, CorruptFolder, file_digest, read_manifest
from workers.tensors import save_tensors
from workers.types import BadInput

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by module name as in the base model (`model.layers.0.self_attn.q_proj`).

    `factors[name] = (A, B)` with A [r, in_features] and B [out_features, r];
    the module adds `scaling(name) * B @ A` to the base weight.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
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
        ranks = {name: a.shape[0] for name, (a, _) in self.factors.items()}
        return {name: rank for name, rank in ranks.items() if rank != self.r}

    def scaling(self, name: str) -> float:
        """What `B @ A` of the module is multiplied by."""
        rank = self.factors[name][0].shape[0]
        return lora_scaling(self.alpha_pattern.get(name, self.lora_alpha), rank, self.use_rslora)


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r (arXiv 2106.09685 section 4.1), or lora_alpha / sqrt(r) with rsLoRA (2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().to("cpu", copy=True).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().to("cpu", copy=True).contiguous()
    save_tensors(tensors, folder / WEIGHTS)
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
    config = read_config(folder / CONFIG)
    factors = _pair_up(folder / WEIGHTS, _read_tensors(folder))
    _check_ranks(folder / CONFIG, config, factors)
    alphas = {name: pattern_value(config.get("alpha_pattern"), name) for name in factors}
    return Adapter(
        factors=factors,
        r=int(config["r"]),
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha is not None},
        base_model=config.get("base_model_name_or_path") or "",
        target_modules=plain_targets(config),
    )


def verify_adapter(folder: Path) -> None:
    """Check PEFT's two files against the manifest beside them, if there is one. Raises CorruptFolder."""
    if not (folder / MANIFEST).exists():
        return
    files = read_manifest(folder).get("files", {})
    for name in (CONFIG, WEIGHTS):
        if files.get(name, {}).get("sha256") != file_digest(folder / name):
            raise CorruptFolder(f"{folder / name} does not match the digest in {MANIFEST}")


def adapter_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of PEFT's two files: what the adapter is, wherever it lies."""
    return {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)}


def check_finite(adapter: Adapter, where: str) -> None:
    """Raises BadInput naming the first module with a NaN or an infinity."""
    for name, factors in adapter.factors.items():
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise BadInput(
                f"{where}: module '{name}' holds NaN or Inf; use a checkpoint from before it diverged"
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
        raise BadInput(f"{path} is not a whole safetensors file ({error}); copy or save it again") from error


def _pair_up(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (A, B). Refuses what does not pair up: another kind of tensor would be lost silently."""
    sides: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2 or tensor.dtype not in DTYPES:
            shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise BadInput(
                f"{path}: tensor '{key}' ({shape}) is not a factor of a linear layer; retrain without it"
            )
        sides[match[1]][match[2]] = tensor
    if not sides:
        raise BadInput(f"{path} holds no tensor; train the adapter with target_modules that match the base")
    for name, pair in sides.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise BadInput(
                f"{path}: lora_A and lora_B of module '{name}' do not pair up; save the adapter again"
            )
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _check_ranks(
    path: Path, config: Mapping[str, Any], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    r = int(config["r"])
    for name, (a, _) in factors.items():
        rank = pattern_value(config.get("rank_pattern"), name) or r
        if rank != a.shape[0]:
            raise BadInput(
                f"{path}: module '{name}' should have rank {rank} but its tensors have {a.shape[0]}; "
                "put the true rank into rank_pattern"
            )
