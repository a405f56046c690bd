"""What the servers would do with an adapter, and that a repaired one is the same adapter to all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapters import random_adapter
from tests.models import make_base
from workers.adapter import Adapter
from workers.servers import base_of_card, commands, lost, obstacles, repaired, vllm_rank

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: (32, 32), V: (16, 32)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_base(folder)
    return folder


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    a, b = adapter.factors[module]
    return adapter.scaling(module) * (b.double() @ a.double())


def against(adapter: Adapter, base: Path) -> set[str]:
    return {obstacle.server for obstacle in obstacles(adapter, base)}


def test_obstacles_plain_lora_has_none(base: Path) -> None:
    assert obstacles(random_adapter(1, shapes=SHAPES, r=4, lora_alpha=8), base) == []


def test_obstacles_rslora_is_misread_by_those_that_ignore_it(base: Path) -> None:
    adapter = random_adapter(1, shapes=SHAPES, r=4, lora_alpha=8, use_rslora=True)
    found = obstacles(adapter, base)
    assert {obstacle.server for obstacle in found} == {"SGLang", "llama.cpp"}
    assert all("by 2, not by 4" in obstacle.words and obstacle.repairable for obstacle in found)


def test_obstacles_another_rank_of_a_module_is_misread_by_those_that_read_one_rank(base: Path) -> None:
    adapter = random_adapter(1, shapes=SHAPES, r=4, lora_alpha=8, ranks={Q: 2})
    assert against(adapter, base) == {"vLLM", "SGLang"}


def test_obstacles_another_alpha_of_a_module_is_misread_by_all(base: Path) -> None:
    adapter = replace(random_adapter(1, shapes=SHAPES, r=4, lora_alpha=8), alpha_pattern={V: 4.0})
    assert against(adapter, base) == {"vLLM", "SGLang", "llama.cpp"}


def test_obstacles_tied_head_cannot_be_repaired_and_is_to_be_merged(base: Path) -> None:
    found = obstacles(random_adapter(1, shapes={"lm_head": (259, 32)}, r=4, lora_alpha=8), base)
    assert [(obstacle.server, obstacle.repairable) for obstacle in found] == [("llama.cpp", False)]
    assert "release it merged" in found[0].words


def test_repaired_adapter_is_the_same_and_no_server_minds(base: Path) -> None:
    adapter = random_adapter(1, shapes=SHAPES, r=4, lora_alpha=6, use_rslora=True, ranks={Q: 7})
    adapter = replace(adapter, alpha_pattern={V: 3.0})
    fixed = repaired(adapter)
    assert obstacles(fixed, base) == []
    assert {a.shape[0] for a, _ in fixed.factors.values()} == {fixed.r} == {7}
    for module in SHAPES:
        assert fixed.scaling(module) == 1
        assert torch.allclose(delta(fixed, module), delta(adapter, module), rtol=0, atol=1e-5)


def test_repaired_adapter_above_vllms_ranks_is_the_nearest_of_rank_512() -> None:
    wide = {"x": (700, 600)}
    adapter = random_adapter(1, shapes=wide, r=520, lora_alpha=520)
    fixed = repaired(adapter)
    s = torch.linalg.svdvals(delta(adapter, "x"))
    error = torch.linalg.matrix_norm(delta(fixed, "x") - delta(adapter, "x"))
    assert fixed.r == 512
    assert lost(adapter, fixed) == pytest.approx(float(error / torch.linalg.vector_norm(s)), rel=1e-4)
    assert float(error) == pytest.approx(float(torch.linalg.vector_norm(s[512:])), rel=1e-4)


@pytest.mark.parametrize(("r", "asked"), [(1, 1), (2, 8), (48, 64), (129, 256), (512, 512)])
def test_vllm_rank_is_the_smallest_it_offers_that_holds_the_adapter(r: int, asked: int) -> None:
    assert vllm_rank(random_adapter(1, shapes={"x": (600, 600)}, r=r, lora_alpha=r)) == asked


def test_commands_of_an_adapter_name_the_base_and_of_a_merged_model_do_not() -> None:
    assert "--max-lora-rank 16 --lora-modules support=$PWD" in commands("t.support", "B", False, 16)["vLLM"]
    assert all("B" not in command for command in commands("t.support", "B", True, 16).values())


def test_commands_write_nothing_into_the_folder_that_was_signed() -> None:
    for merged in (False, True):
        written = commands("t.support", "B", merged, 16)["llama.cpp"].split("--outfile ")[1:]
        assert written
        assert all(part.startswith("../") for part in written)


@pytest.mark.parametrize(
    ("named", "in_card"), [("org/model", "org/model"), ("tiny", '"$BASE"'), ("", '"$BASE"')]
)
def test_base_of_card_is_what_a_reader_can_look_up(named: str, in_card: str) -> None:
    assert base_of_card(named) == in_card


def test_obstacles_layer_that_sglang_does_not_know_is_to_be_merged(base: Path) -> None:
    found = obstacles(random_adapter(1, shapes={"h.0.attn.c_attn": (96, 32)}, r=4, lora_alpha=8), base)
    assert [(obstacle.server, obstacle.repairable) for obstacle in found] == [("SGLang", False)]
    assert "c_attn" in found[0].words
