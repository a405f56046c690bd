"""Interchange with PEFT: our files load there, its files load here, and its `cat` is the oracle of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from tests.interchange import CLOSE, TOKENS, linears, load, logits, plainly_merged, small
from tests.models import make_base
from workers.adapter import read_adapter, short_names, write_adapter
from workers.fuse import fuse
from workers.task import run
from workers.types import FuseTask


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_interchange_written_adapter_in_peft_gives_logits_of_plain_merge(
    base_dir: Path, tmp_path: Path, use_rslora: bool
) -> None:
    shapes = linears(load(base_dir))
    q, down = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    adapter = small(
        1, shapes, r=4, lora_alpha=12, use_rslora=use_rslora, ranks={q: 2, down: 7}, alpha_pattern={down: 3}
    )
    write_adapter(adapter, tmp_path)
    model = PeftModel.from_pretrained(load(base_dir), tmp_path)
    ranks = {name: part.r["default"] for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    assert ranks == {f"base_model.model.{name}": a.shape[0] for name, (a, _) in adapter.factors.items()}
    found = logits(model)
    assert float((found - logits(plainly_merged(base_dir, [adapter], [1.0]))).abs().max()) < CLOSE
    assert float((found - logits(load(base_dir))).abs().max()) > 100 * CLOSE


def test_interchange_short_target_modules_select_the_same_modules_in_peft(
    base_dir: Path, tmp_path: Path
) -> None:
    base = load(base_dir)
    chosen = {
        name: shape for name, shape in linears(base).items() if name.endswith(("q_proj", "0.mlp.up_proj"))
    }
    targets = short_names(chosen, [name for name, _ in base.named_modules()])
    assert targets == ("model.layers.0.mlp.up_proj", "q_proj")
    write_adapter(small(1, chosen, target_modules=targets), tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path)
    wrapped = {name for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    assert wrapped == {f"base_model.model.{name}" for name in chosen}


def trained_in_peft(base_dir: Path, seed: int, **config: Any) -> PeftModel:
    """A PEFT adapter after one large step of SGD from random factors."""
    torch.manual_seed(seed)
    settings = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    model = get_peft_model(load(base_dir), settings)
    model(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"r": 4, "target_modules": r".*\.(k|v)_proj", "rank_pattern": {"v_proj": 2, "1.self_attn.k_proj": 6}},
        {
            "r": 2,
            "target_modules": ["o_proj"],
            "alpha_pattern": {"layers.0.*": 7},
            "layers_to_transform": [0],
        },
    ],
)
def test_interchange_adapter_trained_in_peft_reads_with_the_same_logits(
    base_dir: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    theirs = trained_in_peft(base_dir, 1, **config)
    theirs.save_pretrained(tmp_path)
    ours = plainly_merged(base_dir, [read_adapter(tmp_path)], [1.0])
    assert float((logits(ours) - logits(theirs)).abs().max()) < CLOSE


@pytest.mark.parametrize(("rule", "rank"), [("cat", None), ("svd", 3)])
def test_interchange_fusion_of_plain_lora_agrees_with_peft(
    base_dir: Path, tmp_path: Path, rule: str, rank: int | None
) -> None:
    parts = [{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3}]
    for i, config in enumerate(parts):
        model = trained_in_peft(base_dir, i, target_modules=["q_proj", "up_proj"], **config)
        model.save_pretrained(tmp_path / str(i))
    peft = PeftModel.from_pretrained(load(base_dir), tmp_path / "0", adapter_name="0")
    peft.load_adapter(tmp_path / "1", adapter_name="1")
    peft.add_weighted_adapter(["0", "1"], [0.7, 0.4], "both", combination_type=rule, svd_rank=rank)
    fused, _ = fuse([read_adapter(tmp_path / str(i)) for i in range(2)], [0.7, 0.4], rule, rank)
    for name, (a, b) in fused.factors.items():
        expected = peft.base_model.model.get_submodule(name).get_delta_weight("both")
        assert torch.allclose(b @ a, expected, atol=CLOSE * float(expected.abs().max())), name
    assert fused.target_modules == ("q_proj", "up_proj")


@pytest.mark.parametrize(("rule", "rank"), [("cat", None), ("svd", 64)])
def test_interchange_fused_folder_in_peft_gives_logits_of_plain_sum(
    base_dir: Path, tmp_path: Path, rule: str, rank: int | None
) -> None:
    shapes = linears(load(base_dir))
    some = {name: shape for name, shape in shapes.items() if "self_attn" in name}
    parts = [
        small(1, shapes, r=3, lora_alpha=6, use_rslora=True),
        small(2, some, r=5, ranks={"model.layers.0.self_attn.k_proj": 2}),
    ]
    for i, part in enumerate(parts):
        (tmp_path / str(i)).mkdir()
        write_adapter(part, tmp_path / str(i))
    folders = tuple(str(tmp_path / str(i)) for i in range(2))
    run(FuseTask(folders, (0.8, -0.5), rule, rank, str(tmp_path / "fused")))
    model = PeftModel.from_pretrained(load(base_dir), tmp_path / "fused")
    expected = logits(plainly_merged(base_dir, parts, [0.8, -0.5]))
    assert float((logits(model) - expected).abs().max()) < CLOSE
