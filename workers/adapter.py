"""An adapter as tensors, and its PEFT files: `adapter_config.json` and `adapter_model.safetensors`.

Owns the PEFT layout. Nothing else reads or writes these two files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


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
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str = ""

    def scaling(self, name: str) -> float:
        """lora_alpha / r (arXiv 2106.09685 section 4.1), or lora_alpha / sqrt(r) with rsLoRA (2312.03732)."""
        rank = self.factors[name][0].shape[0]
        alpha = self.alpha_pattern.get(name, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` PEFT writes for the same adapter, reduced to what describes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted(adapter.factors),
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.dumps(adapter_config(adapter), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(config + "\n")
