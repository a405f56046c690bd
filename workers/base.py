"""The frozen base on this rank: loaded, wrapped for adapters, partitioned. The only `import deepspeed`.

The order matters and is fixed here: load (already partitioned under ZeRO-3), freeze, wrap the linear layers
and the head, and only then let DeepSpeed hook the modules, so that its trace never changes afterwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from workers import head, lora
from workers.ranks import Ranks
from workers.types import BadInput, BaseSpec

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass
class Base:
    """A resident base: `model` is the Hugging Face causal LM, hooked by DeepSpeed if it is partitioned."""

    spec: BaseSpec
    model: Any
    tokenizer: Any
    slots: lora.Slots
    zero: Literal["none", "3"]
    device: torch.device
    parameters: int
    engine: Any = None
    _keep_alive: Any = None

    @property
    def longest(self) -> int:
        """Most tokens a row may have."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def trace(self) -> str:
        """State of DeepSpeed's module trace: COMPLETE while its prefetch is valid. `none` when plain."""
        if self.engine is None:
            return "none"
        coordinator = self.engine.optimizer.get_param_coordinator()
        return str(coordinator._PartitionedParameterCoordinator__trace_mode.name)

    @property
    def partitioned(self) -> bool:
        """Whether this rank holds only its share of the weights between passes."""
        parameters = list(self.model.parameters())
        return all(hasattr(p, "ds_numel") for p in parameters) and any(p.numel() == 0 for p in parameters)


def load_base(spec: BaseSpec, ranks: Ranks) -> Base:
    """Collective. Raises BadInput if the folder holds no usable model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(spec.path)
    if not (folder / "config.json").is_file():
        raise BadInput(f"base_model: {folder} has no config.json; it must be a Hugging Face model folder")
    zero = _zero_mode(spec, ranks)
    keep_alive = _announce_zero3(spec, ranks) if zero == "3" else None
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[spec.dtype],
        attn_implementation=spec.attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    slots = lora.install(model, excluded=[model.get_output_embeddings()])
    head.install(model)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    base = Base(spec, model, tokenizer, slots, zero, device, parameters, _keep_alive=keep_alive)
    if zero == "3":
        _partition(base)
    else:
        model.to(device)
    return base


def _zero_mode(spec: BaseSpec, ranks: Ranks) -> Literal["none", "3"]:
    """`auto` is plain when one rank holds the base, ZeRO-3 otherwise."""
    if spec.zero == "auto":
        return "3" if ranks.world_size > 1 else "none"
    return spec.zero


def _deepspeed_config(spec: BaseSpec) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **spec.deepspeed},
    }


def _announce_zero3(spec: BaseSpec, ranks: Ranks) -> Any:
    """While the returned object lives, `from_pretrained` loads weights already partitioned."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # DeepSpeed would compile a shared-memory all-reduce that only its inference engine calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.form_group()  # or DeepSpeed looks for MPI when one rank has no group
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    # DeepSpeed's early partitioning knows no float64; such a base is partitioned after loading instead.
    return None if spec.dtype == "float64" else HfDeepSpeedConfig(_deepspeed_config(spec))


def _partition(base: Base) -> None:
    """Hook every module to gather its weights before use and release them after."""
    import deepspeed

    # Without this a rank whose rows touch no early adapter would skip early backward gathers, and the
    # collectives of the ranks would no longer pair up.
    base.model.get_input_embeddings().register_forward_hook(_require_grad)
    base.engine, *_ = deepspeed.initialize(model=base.model, config=_deepspeed_config(base.spec))


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
