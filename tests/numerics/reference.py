"""The reference every host is held against: plain PEFT, `torch.optim.AdamW`, one process, one job.

Shares with the host only what defines the job: its rows, the order of its samples, its first A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.optimization import get_scheduler

from tests.numerics.masks import Masks, key_dropout, keys_of
from workers.adapter import Adapter
from workers.compose import padded_length
from workers.data import encode_all
from workers.factor_file import PREFIX
from workers.order import batch_samples, num_steps
from workers.types import BaseSpec, JobSpec

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]


def train_alone(
    base: BaseSpec,
    job: JobSpec,
    first: Adapter,
    steps: int | None = None,
    hooked: bool = False,
    masks: Masks | None = None,
) -> Trained:
    """Train `job` by itself, starting from `first`. All rows of a step in one padded batch.

    Dropout, if the job has it, takes its masks from `masks`.

    With `hooked`, what several modules send back to a shared input is summed as under DeepSpeed's hooks.
    """
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=DTYPES[base.dtype])
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    spec, training = job.adapter, job.training
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=0.0,
        use_rslora=spec.use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=base.dtype != "float64")
    _set_factors(model, first)
    if hooked:
        _sum_by_module(model)
    dropouts = key_dropout(model, masks, PREFIX) if masks else []
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    rows = encode_all(tokenizer, job.train, training.sequence_len)
    total = num_steps(training, len(rows))
    adamw = torch.optim.AdamW(
        trainable,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
    schedule = get_scheduler(name, adamw, math.ceil(training.warmup_ratio * total), total)
    losses = []
    for step in range(steps or total):
        samples = batch_samples(training.seed, step, len(rows), training.global_batch_size)
        batch = [rows[sample] for sample in samples]
        for dropout in dropouts:
            dropout.keys = keys_of(batch, training.seed, step)
        losses.append(_step(model, batch))
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        schedule.step()
    return Trained(losses, _get_factors(model))


def _step(model: torch.nn.Module, rows: list) -> float:
    """Sum of cross-entropy over targets, over their number; backward. Returns the loss."""
    length = padded_length(max(len(row.input_ids) for row in rows))
    input_ids = torch.tensor([[*row.input_ids, *[0] * (length - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels, *[-100] * (length - len(row.labels))] for row in rows])
    logits = model(input_ids=input_ids).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as transformers' own loss does
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    targets = int((labels[:, 1:] != -100).sum())
    (losses.sum() / targets).backward()
    return float(losses.detach().double().sum()) / targets


def _sum_by_module(model: torch.nn.Module) -> None:
    """Pass every module's inputs through a node of their own, as DeepSpeed's backward hooks do.

    A module's parts of an input's gradient are then added up before they meet those of its siblings.
    """
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: tuple(map(_own_node, inputs)))


def _own_node(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, torch.Tensor) and value.requires_grad else value


def _set_factors(model: torch.nn.Module, first: Adapter) -> None:
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in first.factors.items():
            state[f"{PREFIX}{name}.lora_A.default.weight"].copy_(a)
            state[f"{PREFIX}{name}.lora_B.default.weight"].copy_(b)


def _get_factors(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    state = get_peft_model_state_dict(model)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix(PREFIX): (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"])
        for name in names
    }
