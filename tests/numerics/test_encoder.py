"""Adapters on Hugging Face models that are no decoders, as they come: two jobs in one batch, each as in PEFT.

The host trains causal language models alone; its layers take any model whose rows lie in the first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from tests.numerics.jobs import distance
from tests.numerics.slots import adapted
from workers.lora import Segment
from workers.optim import JobOptimizer
from workers.types import AdapterSpec, TrainingSpec

STEPS = 5
ROWS, TOKENS = 3, 20
SPECS = [AdapterSpec(4, 8), AdapterSpec(6, 3, use_rslora=True)]
TRAINING = TrainingSpec(1e-2, ROWS, TOKENS, max_steps=STEPS, lr_scheduler="constant", warmup_ratio=0.0)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def whole(build) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval().requires_grad_(False)


def inputs_of(model: nn.Module, job: int, step: int) -> dict[str, Tensor]:
    """A job's rows of one step, some of them padded on the right."""
    draw = torch.Generator().manual_seed(100 * job + step)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 5 - job :] = 0
    ids = torch.randint(3, 64, (ROWS, TOKENS), generator=draw) * mask
    if isinstance(model, BertForSequenceClassification):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(ROWS)}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :7].contiguous()}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def train_together(build, first: list[Mapping[str, tuple[Tensor, Tensor]]]) -> list[dict]:
    model = whole(build)
    adapters = adapted(model)
    optimizers = []
    for job, spec in enumerate(SPECS):
        slot = adapters.slots.create(job, spec, seed=job)
        for name, (a, b) in slot.values().items():
            a.copy_(first[job][name][0])
            b.copy_(first[job][name][1])
        optimizers.append(JobOptimizer(slot, TRAINING, STEPS))
    for step in range(STEPS):
        parts = [inputs_of(model, job, step) for job in range(2)]
        both = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        with adapters.rows([Segment(0, 0, ROWS), Segment(1, ROWS, 2 * ROWS)]):
            logits = model(**both).logits
            losses = [loss_of(logits[job * ROWS : (job + 1) * ROWS], parts[job]["labels"]) for job in (0, 1)]
            sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [adapters.slots[job].values() for job in range(2)]


def peft_of(build, spec: AdapterSpec, seed: int) -> nn.Module:
    model = whole(build)
    names = sorted(name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.r, lora_alpha=int(spec.lora_alpha), use_rslora=spec.use_rslora, target_modules=names
    )
    return get_peft_model(model, config)


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def train_alone(model: nn.Module, job: int) -> dict[str, tuple[Tensor, Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay)
    for step in range(STEPS):
        inputs = inputs_of(model.base_model.model, job, step)
        loss_of(model(**inputs).logits, inputs["labels"]).backward()
        nn.utils.clip_grad_norm_(trained, TRAINING.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
    return peft_factors(model)


@pytest.mark.parametrize("build", [bert, t5])
def test_encoder_two_jobs_in_one_batch_each_end_as_in_peft(build):
    models = [peft_of(build, spec, seed) for seed, spec in enumerate(SPECS)]
    for model in models:
        model.to(torch.float64)
    first = [peft_factors(model) for model in models]
    together = train_together(build, first)
    for job, model in enumerate(models):
        alone = train_alone(model, job)
        assert distance(alone, first[job]) > 1e-3
        assert distance(together[job], alone) < 1e-12
