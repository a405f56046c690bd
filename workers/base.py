"""The frozen base on this rank: loaded, wrapped for adapters, partitioned. The only `import deepspeed`.

The order matters and is fixed here: load (already partitioned under ZeRO-3), freeze, wrap the linear layers
and the head, and only then let DeepSpeed hook the modules, so that its trace never changes afterwards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from workers import beside, head, lora, varlen
from workers.int8 import Int8, store
from workers.memory import COPIES, keep_freed_memory
from workers.ranks import Ranks
from workers.rows import longest_row
from workers.slots import Arithmetic, Slots
from workers.types import BadInput, BaseSpec

INT8 = "zero_quantized_nontrainable_weights"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass
class Base:
    """A resident base: `model` is the Hugging Face causal LM, hooked by DeepSpeed if it is partitioned."""

    spec: BaseSpec
    model: Any
    tokenizer: Any
    slots: Slots
    adapters: lora.Adapters
    zero: Literal["none", "3"]
    device: torch.device
    parameters: int
    engine: Any = None

    @property
    def longest(self) -> int:
        """Most tokens a row may have."""
        return longest_row(self.model.config)

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

    def abandon_pass(self) -> None:
        """After a pass that failed on all ranks: give back what it had gathered."""
        if self.engine is not None:
            self.engine.optimizer.release_backward_leftovers()
            self.engine.optimizer.get_param_coordinator().release_and_reset_all(self.model)

    @property
    def bytes_per_parameter(self) -> int:
        """Of an adapter in a slot: weight, gradient and AdamW's two moments, float32 at least.

        Fused arithmetic holds a copy of the weights in the base's dtype beside them, if that is another.
        """
        dtype = DTYPES[self.spec.dtype]
        trained = torch.promote_types(dtype, torch.float32)
        copied = dtype.itemsize if self.slots.arithmetic == "fused" and dtype != trained else 0
        return COPIES * trained.itemsize + copied

    @property
    def partitioned(self) -> bool:
        """Whether this rank holds only its share of the weights between passes."""
        parameters = list(self.model.parameters())
        return all(hasattr(p, "ds_numel") for p in parameters) and any(p.numel() == 0 for p in parameters)


def load_base(spec: BaseSpec, ranks: Ranks) -> Base:
    """Collective. Raises BadInput if the folder holds no usable model, or this machine cannot hold it so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, zero = Path(spec.path), _zero_mode(spec, ranks)
    _refuse_what_is_not_causal(folder)
    _refuse_options(spec, zero)
    device = _device()
    with _partitioned_from_the_start(spec, ranks) if zero == "3" else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[spec.dtype],
            attn_implementation=varlen.NAME if spec.attention == "varlen" else spec.attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **(_four_bits(spec, device) if spec.load_in_4bit else {}),
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    if spec.load_in_4bit:
        parameters = model.num_parameters()  # two weights share a byte
    _freeze(model, spec)
    layers = lora.linear_layers(model, excluded=[model.get_output_embeddings()])
    slots = Slots(layers, DTYPES[spec.dtype], device, _arithmetic(spec, device))
    adapters = lora.Adapters(slots)
    (beside if spec.load_in_4bit else lora).install(adapters)
    head.install(model)
    base = Base(spec, model, tokenizer, slots, adapters, zero, device, parameters)
    if zero == "3":
        _partition(base)
    elif not spec.load_in_4bit:
        model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    if spec.attention == "varlen":
        varlen.check(model, device)
    return base


def _device() -> torch.device:
    """This rank's own GPU; torchrun numbers those of one machine, Ray shows each rank just one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _arithmetic(spec: BaseSpec, device: torch.device) -> Arithmetic:
    """`auto` gives plain PEFT's bits where that costs little, and speed on a GPU."""
    if spec.arithmetic == "auto":
        return "fused" if device.type == "cuda" else "exact"
    return spec.arithmetic


def _zero_mode(spec: BaseSpec, ranks: Ranks) -> Literal["none", "3"]:
    """`auto` is plain when one rank holds the base, ZeRO-3 otherwise."""
    if spec.zero == "auto":
        return "3" if ranks.world_size > 1 else "none"
    return spec.zero


def _freeze(model: Any, spec: BaseSpec) -> None:
    """No weight learns, nothing is cached, and the base drops nothing out, in training mode either."""
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode alone


# ---- what is refused ---------------------------------------------------------------------------------


def _refuse_what_is_not_causal(folder: Path) -> None:
    """Only decoders with a language-model head train here: rows are right-padded under a causal mask."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise BadInput(f"base_model: {folder} has no config.json; it must be a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise BadInput(f"base_model: {folder / 'config.json'} cannot be used: {error}") from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    written: list[str] = getattr(config, "architectures", None) or []
    if causal is None or (written and causal.__name__ not in written):
        raise BadInput(
            f"base_model: {folder} holds {', '.join(written) or config.model_type}, and only causal language "
            "models can be trained on today: no encoders, no encoder-decoders, no models with another head"
        )


def _refuse_options(spec: BaseSpec, zero: str) -> None:
    """What this machine, or DeepSpeed, cannot do. Raises BadInput naming the key of the base file."""
    from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

    on_gpu = torch.cuda.is_available()
    if spec.load_in_4bit and zero == "3":
        raise BadInput("load_in_4bit: ZeRO-3 cannot partition 4-bit weights; set zero: none")
    if spec.load_in_4bit and not (on_gpu and is_bitsandbytes_available()):
        raise BadInput("load_in_4bit: it needs a GPU and the package bitsandbytes; use dtype: bfloat16 here")
    if spec.attention == "flash_attention_2" and not (on_gpu and is_flash_attn_2_available()):
        raise BadInput("attention: flash_attention_2 needs a GPU and the package flash-attn; use sdpa here")
    if spec.attention == "varlen" and on_gpu and spec.dtype != "bfloat16":
        raise BadInput("attention: varlen needs dtype: bfloat16 on a GPU; use sdpa for this one")
    if spec.deepspeed.get("zero_quantized_weights") and not on_gpu:
        raise BadInput(
            "deepspeed.zero_quantized_weights: DeepSpeed's int8 kernels need a GPU; "
            "zero_quantized_nontrainable_weights works without"
        )
    offload = spec.deepspeed.get("offload_param") or {}
    if spec.deepspeed.get(INT8) and (
        offload.get("device") == "nvme" or spec.deepspeed.get("zero_hpz_partition_size", 1) > 1
    ):
        raise BadInput(
            f"deepspeed.{INT8}: it goes with neither offload to nvme nor zero_hpz_partition_size; keep one"
        )


def _four_bits(spec: BaseSpec, device: torch.device) -> dict[str, Any]:
    """NF4 with double quantization (QLoRA, arXiv 2305.14314 section 3), computed in the base's dtype."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[spec.dtype],
    )
    return {"quantization_config": config, "device_map": {"": device}}


# ---- ZeRO-3 ------------------------------------------------------------------------------------------


def _deepspeed_config(spec: BaseSpec) -> dict[str, Any]:
    block = {key: value for key, value in spec.deepspeed.items() if key != INT8}
    if spec.deepspeed.get(INT8):
        # DeepSpeed 0.19.8 casts weights from a coalesced gather to the dtype they are stored in: int8.
        block["stage3_allgather_sequential"] = True
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **block},
    }


@contextmanager
def _partitioned_from_the_start(spec: BaseSpec, ranks: Ranks) -> Generator[None]:
    """Within the block, `from_pretrained` loads weights already partitioned."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = _deepspeed_config(spec)
    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValueError as error:
        raise BadInput(f"deepspeed: {_first_mistake(error, DeepSpeedZeroConfig)}") from error
    # DeepSpeed would compile a shared-memory all-reduce that only its inference engine calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.form_group()  # or DeepSpeed looks for MPI when one rank has no group
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    # DeepSpeed's early partitioning knows no float64; such a base is partitioned after loading instead.
    announced = None if spec.dtype == "float64" else HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        # By name: a plain base loaded later by this process would come partitioned if the object lived on.
        del announced
        unset_hf_deepspeed_config()


def _deepspeed() -> Any:
    """DeepSpeed, without the MLflow that its autotuner would import: half of the seconds, 100 MB a rank."""
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    try:
        import deepspeed
    finally:
        if sys.modules["mlflow"] is None:
            del sys.modules["mlflow"]
    return deepspeed


def _first_mistake(error: Any, model: Any) -> str:
    """The first of pydantic's findings: the key, what is wrong, and the nearest key if it is unknown."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']}"
    known = [field.alias or name for name, field in model.model_fields.items()]
    near = get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (
        f"; did you mean {near[0]!r}?" if near else "; see DeepSpeed's documentation"
    )


def _partition(base: Base) -> None:
    """Hook every module to gather its weights before use and release them after."""
    import deepspeed

    # Without this a rank whose rows touch no early adapter would skip early backward gathers, and the
    # collectives of the ranks would no longer pair up.
    base.model.get_input_embeddings().register_forward_hook(_require_grad)
    base.engine, *_ = deepspeed.initialize(model=base.model, config=_deepspeed_config(base.spec))
    if base.spec.deepspeed.get(INT8):
        deepspeed.zero.Init.quantizer_module = Int8()
        for layer in base.slots.layers.values():
            store(layer.weight)


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
