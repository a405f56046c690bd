"""How a host holds its base: what is refused, and the words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Gemma3Config, T5Config

from tests.models import byte_tokenizer, make_base
from workers.base import load_base
from workers.ranks import Ranks
from workers.reading import Reader
from workers.types import BadInput, BaseSpec

INT8 = "zero_quantized_nontrainable_weights"


@pytest.fixture
def spec(tmp_path):
    return BaseSpec(str(make_base(tmp_path / "base")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is missing here")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: it needs a GPU and the package bitsandbytes"),
        ({"attention": "flash_attention_2"}, "attention: flash_attention_2 needs a GPU"),
        (
            {"zero": "3", "deepspeed": {"zero_quantized_weights": True}},
            "zero_quantized_weights: DeepSpeed's int8 kernels need a GPU",
        ),
    ],
)
def test_base_option_that_needs_a_gpu_is_refused_without_one(spec, options, words):
    with pytest.raises(BadInput, match=words):
        load_base(replace(spec, **options), Ranks())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero": "3", "load_in_4bit": True}, "load_in_4bit: ZeRO-3 cannot partition 4-bit weights"),
        (
            {"zero": "3", "deepspeed": {"stage3_prefetch_bucket": 1}},
            "deepspeed: unknown key 'stage3_prefetch_bucket'; did you mean 'stage3_prefetch_bucket_size'",
        ),
        (
            {"zero": "3", "deepspeed": {"offload_param": {"device": "disk"}}},
            r"deepspeed: offload_param\.device: Input should be",
        ),
        (
            {"zero": "3", "deepspeed": {INT8: True, "zero_hpz_partition_size": 2}},
            "goes with neither offload to nvme nor zero_hpz_partition_size",
        ),
    ],
)
def test_base_option_that_cannot_be_is_refused_by_key(spec, options, words):
    with pytest.raises(BadInput, match=words):
        load_base(replace(spec, **options), Ranks())


def test_base_that_is_an_encoder_is_refused_by_its_architecture(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="holds BertForMaskedLM, and only causal language models"):
        load_base(BaseSpec(str(tmp_path)), Ranks())


def test_base_that_is_an_encoder_decoder_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="holds t5, and only causal language models"):
        load_base(BaseSpec(str(tmp_path)), Ranks())


@pytest.mark.parametrize("config", ["{}", json.dumps({"model_type": "no-such-model"}), "not json"])
def test_base_with_a_config_that_cannot_be_used_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=r"config\.json"):
        load_base(BaseSpec(str(tmp_path)), Ranks())


def test_base_never_drops_anything_out_itself(tmp_path):
    """Checkpointing needs training mode, in which a base's own dropout would draw at random."""
    path = make_base(tmp_path / "base", attention_dropout=0.5)
    base = load_base(BaseSpec(str(path), activation_checkpointing=True), Ranks())
    rows_RT = torch.arange(40).view(2, 20)
    first, second = (base.model(input_ids=rows_RT).logits for _ in range(2))
    assert base.model.training
    assert torch.equal(first, second)


def test_base_of_several_parts_allows_rows_as_long_as_its_text_part_does(spec):
    base = load_base(replace(spec, zero="none"), Ranks())
    base.model.config = Gemma3Config(text_config={"max_position_embeddings": 64})
    assert base.longest == 64
    assert Reader(base.model, Ranks(), base.device, 0).longest == 64


def test_base_that_is_plain_loads_plain_beside_a_partitioned_one(spec):
    partitioned = load_base(replace(spec, zero="3"), Ranks())
    plain = load_base(replace(spec, zero="none"), Ranks())
    assert partitioned.engine is not None
    assert not any(hasattr(parameter, "ds_id") for parameter in plain.model.parameters())
