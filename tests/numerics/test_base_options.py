"""Ways of holding a base change no result; int8 weights change it to that of the same weights held whole."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import byte_tokenizer, make_base
from tests.numerics.jobs import adapters, attach, distance, drive, first_adapter, run, three_jobs
from tests.numerics.pair import two_ranks
from tests.numerics.reference import train_alone
from workers.host import Host
from workers.int8 import quantized, restored
from workers.ranks import Ranks
from workers.types import BaseSpec

INT8 = {"zero_quantized_nontrainable_weights": True}
NO_GATHER = {"stage3_param_persistence_threshold": 0}


def base_of(folder: Path, **overrides) -> BaseSpec:
    """Wide enough for whole groups of int8 on two ranks."""
    path = make_base(folder / "base", hidden_size=64, intermediate_size=128)
    return replace(BaseSpec(str(path), name="tests/random", tokens_per_tick=1024), **overrides)


def rounded(spec: BaseSpec, folder: Path) -> BaseSpec:
    """The same base with its linear weights as int8 leaves them."""
    model = AutoModelForCausalLM.from_pretrained(spec.path)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(restored(*quantized(module.weight.to(torch.float64))))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return replace(spec, path=str(folder), deepspeed={}, zero="none")


def stored_dtypes(ranks: Ranks, spec: BaseSpec) -> set[str]:
    host = Host.load(spec, ranks)
    return {str(layer.weight.ds_tensor.dtype) for layer in host.base.slots.layers.values()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_base_in_int8_trains_as_the_same_rounded_base_does_alone(tmp_path, dtype, world_size):
    spec = base_of(tmp_path, dtype=dtype, zero="3", deepspeed={**INT8, **NO_GATHER})
    assert (two_ranks(stored_dtypes, spec) if world_size == 2 else stored_dtypes(Ranks(), spec)) == {
        "torch.int8"
    }
    jobs = three_jobs(tmp_path, steps=20)
    found = adapters(run(spec, {0: attach(*jobs)}, world_size))
    plain = rounded(spec, tmp_path / "rounded")
    for job in jobs:
        alone = train_alone(plain, job, first_adapter(plain, job))
        # float64: the saved copy of the rounded weights is float32, and so is not what the host restores.
        assert distance(found[job.job].factors, alone.factors) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"deepspeed": {"offload_param": {"device": "cpu", "pin_memory": False}}}, id="offload"),
        pytest.param({"deepspeed": {"stage3_prefetch_bucket_size": 0}}, id="no prefetch"),
        pytest.param({"deepspeed": {"stage3_allgather_sequential": True, **NO_GATHER}}, id="one by one"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
    ],
)
def test_base_held_otherwise_changes_no_bit(tmp_path, options):
    spec = base_of(tmp_path)
    jobs = three_jobs(tmp_path, steps=6)
    expected = adapters(run(spec, {0: attach(*jobs)}, 2))
    again = [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-again") for job in jobs]
    found = adapters(run(replace(spec, **options), {0: attach(*again)}, 2))
    for job in expected:
        for name, pair in expected[job].factors.items():
            assert torch.equal(found[job].factors[name][0], pair[0])
            assert torch.equal(found[job].factors[name][1], pair[1])


def test_base_attention_eager_agrees_with_sdpa(tmp_path):
    """As far as float32 reaches: transformers' eager attention takes its softmax there."""
    spec = base_of(tmp_path, dtype="float64")
    jobs = three_jobs(tmp_path, steps=10)
    expected = adapters(run(spec, {0: attach(*jobs)}))
    again = [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-eager") for job in jobs]
    found = adapters(run(replace(spec, attention="eager"), {0: attach(*again)}))
    for job in expected:
        assert distance(found[job].factors, expected[job].factors) < 1e-6


def test_base_partitioned_on_one_rank_alone_needs_no_launcher(tmp_path):
    spec = base_of(tmp_path, zero="3")
    host = Host.load(spec, Ranks())
    events = drive(host, {0: attach(*three_jobs(tmp_path, steps=4))})
    assert host.base.trace == "COMPLETE"
    assert len(adapters(events)) == 3


def loaded_with_mlflow(ranks: Ranks, spec: BaseSpec) -> bool:
    assert Host.load(spec, ranks).base.engine is not None
    return "mlflow" in sys.modules


def test_base_partitioned_is_loaded_without_the_mlflow_that_deepspeed_would_import(tmp_path):
    assert not two_ranks(loaded_with_mlflow, base_of(tmp_path))
