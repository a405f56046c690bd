"""Rows that lie end to end: as in models that read each alone, as plain PEFT trains them, unpadded."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.numerics.jobs import adapters, attach, distance, first_adapter, run, test_base, three_jobs
from tests.numerics.reference import train_alone
from workers.types import Attach, BadInput, StepDone
from workers.varlen import NAME, check, end_to_end

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WITH_KV = {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2}
GPT2 = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
"""Its positions are absolute; the others' are relative, and would forgive wrong ones."""
LENGTHS = (5, 1, 9, 3)


def model_of(config: PreTrainedConfig, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation=attention)
    return made.double().eval()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**WITH_KV),
        Qwen2Config(**WITH_KV),
        MistralConfig(**WITH_KV, sliding_window=4),
        GPT2,
    ],
    ids=lambda config: config.model_type,
)
def test_varlen_logits_and_gradients_are_those_of_each_row_alone(config):
    rows = [
        torch.randint(50, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS
    ]
    plain, packed = model_of(config, "eager"), model_of(config, NAME)
    alone = torch.cat([plain(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with end_to_end(tuple(accumulate(LENGTHS, initial=0))):
        together = packed(input_ids=torch.cat(rows, dim=1), position_ids=places, use_cache=False).logits
        assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)
        gradient = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (together * gradient).sum().backward()
    (alone * gradient).sum().backward()
    for name, weight in plain.named_parameters():
        assert torch.allclose(packed.get_parameter(name).grad, weight.grad, rtol=1e-10, atol=1e-12), name


def test_varlen_without_rows_end_to_end_is_sdpa():
    padded = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    config = MistralConfig(**WITH_KV, sliding_window=4)
    expected = model_of(config, "sdpa")(input_ids=padded, use_cache=False).logits
    assert torch.equal(model_of(config, NAME)(input_ids=padded, use_cache=False).logits, expected)


def test_varlen_refuses_a_model_whose_attention_does_more():
    check(model_of(LlamaConfig(**WITH_KV), NAME), torch.device("cpu"))
    check(
        model_of(Gemma2Config(**WITH_KV, head_dim=8, attn_logit_softcapping=None), NAME), torch.device("cpu")
    )
    with pytest.raises(BadInput, match=r"varlen does not suit this model: .+softcap"):
        check(model_of(Gemma2Config(**WITH_KV, head_dim=8), NAME), torch.device("cpu"))


def test_varlen_refuses_a_model_that_counts_positions_by_itself():
    model = model_of(GPT2, NAME)

    def deaf(position_ids=None, **inputs):
        return model(**inputs)

    with pytest.raises(BadInput, match="varlen does not suit this model, whose logits"):
        check(deaf, torch.device("cpu"))


@pytest.mark.parametrize(
    ("world_size", "dtype", "bound"), [(1, "float32", 1e-5), (2, "float32", 1e-5), (1, "float64", 1e-12)]
)
def test_varlen_agrees_with_peft_and_pads_nothing(tmp_path, world_size, dtype, bound):
    padded = test_base(tmp_path, dtype=dtype, tokens_per_tick=1024)
    base, jobs = replace(padded, attention="varlen"), three_jobs(tmp_path)
    events = run(base, {0: attach(*jobs[:-1]), 7: [Attach(jobs[-1])]}, world_size)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert all(step.padded_tokens == step.tokens for step in steps)
    found = adapters(events)
    for job in jobs:
        alone = train_alone(padded, job, first_adapter(padded, job))
        losses = [step.loss for step in steps if step.job == job.job]
        assert max(abs(f - e) / e for f, e in zip(losses, alone.losses, strict=True)) < bound
        assert distance(found[job.job].factors, alone.factors) < bound


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"arithmetic": "fused"}], ids=str)
def test_varlen_drops_out_what_padded_rows_do(tmp_path, options):
    padded = test_base(tmp_path, dtype="float64", tokens_per_tick=300, **options)
    jobs = [replace(job, adapter=replace(job.adapter, lora_dropout=0.2)) for job in three_jobs(tmp_path, 12)]
    expected = adapters(run(padded, {0: attach(*jobs)}))
    again = [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-varlen") for job in jobs]
    found = adapters(run(replace(padded, attention="varlen"), {0: attach(*again)}))
    for job in jobs:
        assert distance(found[job.job].factors, expected[job.job].factors) < 1e-12
