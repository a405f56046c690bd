"""Structural gates: what is found of an adapter's files, and what a promotion makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.registry.outlines import structure_in
from orchestrator.structure import CHECKS, findings, unknown_check, wanted
from tests.adapters import SHAPES, random_adapter
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from workers.adapter import read_adapter, write_adapter
from workers.outline import outline
from workers.servers import obstacles

FINANCE, FUSED = "tiny.finance-sentiment", "tiny.multitask"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    """Of rank 8 and scale 1, beside a base that has its modules."""
    path = tmp_path / "adapter"
    path.mkdir()
    write_adapter(random_adapter(1, r=8), path)
    return path


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    path.mkdir()
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save_file({**weights, "model.norm.weight": torch.ones(10)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return path


def failed(folder, base=None, asked=CHECKS) -> dict[str, str]:
    """Check -> words, of those that do not hold."""
    found = findings(asked, structure_in(folder, base))
    return {
        finding.metric.removeprefix("structure."): finding.words for finding in found if not finding.passed
    }


def rewrite(folder, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def poison(folder, value, dtype=torch.float32):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    next(iter(tensors.values()))[-1, -1] = value
    save_file(tensors, path)


def test_sound_adapter_passes_every_check(folder, base):
    assert failed(folder, base) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_in_every_dtype(folder, base, value, dtype):
    poison(folder, 1.0, dtype)
    assert failed(folder, base) == {}
    poison(folder, value, dtype)
    assert set(failed(folder, base)) == {"finite"}
    assert "lora_A.weight' holds NaN or Inf" in failed(folder, base)["finite"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 4}, "should have rank 4 but its tensors have 8"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is ['q_proj']"),
        ({"alpha_pattern": {"(": 3}}, "is not a regular expression"),
    ],
)
def test_adapter_that_is_no_plain_lora_is_not_loadable(folder, base, change, words):
    rewrite(folder, **change)
    found = failed(folder, base)
    assert words in found["loadable"]
    assert set(found) == {"loadable"}
    assert str(folder) not in found["loadable"]


@pytest.mark.parametrize("kept", [0, 6, 200, -1])
def test_weights_that_are_cut_short_are_not_loadable(folder, base, kept):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a whole safetensors file" in failed(folder, base)["loadable"]


@pytest.mark.parametrize("header", ["[]", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [1]}}'])
def test_weights_with_a_header_of_something_else_are_not_loadable(folder, base, header):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert "not a safetensors file" in failed(folder, base)["loadable"]


def test_weights_whose_header_gives_a_tensor_other_bytes_than_its_shape_has_are_not_loadable(folder, base):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    assert b'"shape":[8,' in data
    path.write_bytes(data.replace(b'"shape":[8,', b'"shape":[9,', 1))
    assert "bytes" in failed(folder, base)["loadable"]


def test_weights_that_are_gone_are_not_loadable(folder, base):
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in failed(folder, base)["loadable"]


def test_shapes_are_compared_with_the_base_of_its_modules(folder, base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save_file({**weights, f"{MODULE}.weight": torch.zeros(12, 11)}, other / "model.safetensors")
    assert "is of [12, 10] and the base's of [12, 11]" in failed(folder, other)["shapes"]
    save_file({f"{MODULE}.weight": torch.zeros(12, 10)}, other / "model.safetensors")
    assert "the base has no module" in failed(folder, other)["shapes"]
    for nowhere in (None, tmp_path / "none"):
        assert "its base is not known here" in failed(folder, nowhere)["shapes"]


def test_rank_that_is_no_bucket_of_vllm_and_one_that_it_does_not_take(folder, base):
    write_adapter(random_adapter(1, r=12), folder)
    assert set(failed(folder, base)) == {"bucket"}
    write_adapter(random_adapter(1, r=513), folder)
    assert set(failed(folder, base)) == {"bucket", "vllm"}


@pytest.mark.parametrize(
    "made",
    [
        {"lora_alpha": 16.0},
        {"use_rslora": True},
        {"lora_alpha": 16.0, "use_rslora": True, "ranks": {MODULE: 2}},
        {"ranks": {MODULE: 2}},
        {"ranks": {MODULE: 2}, "alpha_pattern": {MODULE: 2.0}},
        {"alpha_pattern": {MODULE: 4.0}},
    ],
)
def test_scales_are_found_as_the_release_finds_them(folder, base, made):
    """One reading with torch, one without: they name the same servers and the same scales."""
    write_adapter(random_adapter(1, r=8, **made), folder)
    adapter = read_adapter(folder)
    against = {obstacle.server for obstacle in obstacles(adapter, base)}
    names = {"vllm": "vLLM", "sglang": "SGLang", "llama_cpp": "llama.cpp"}
    found = failed(folder, base)
    assert {names[check] for check in found if check in names} == against
    seen = outline(folder)
    assert seen.scales == pytest.approx({name: adapter.scaling(name) for name in adapter.factors})
    assert ("unit_scale" in found) == (made != {"ranks": {MODULE: 2}, "alpha_pattern": {MODULE: 2.0}})


def test_what_is_always_asked_needs_no_asking():
    assert wanted((), fused=False) == ("digest", "loadable", "finite")
    assert wanted(("vllm", "digest"), fused=True) == ("digest", "loadable", "finite", "unit_scale", "vllm")


def test_check_that_is_unknown_is_refused_with_the_nearest():
    assert unknown_check("vllm") is None
    assert "did you mean 'shapes'?" in unknown_check("shape")


# ---- as a user meets them -------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, unsynced):
    return CliWorld(tmp_path)


def test_run_reports_structural_gates_with_the_others_in_show_and_card(world):
    gates = {"gates": {"macro_f1": ">= 0.8"}, "structure": ["bucket", "vllm"]}
    assert world.chorus("run", world.one_job(evaluation=gates, lora_r=8)).exit_code == 0
    shown = world.read("adapters", "show", f"{FINANCE}@champion")
    assert [(gate["metric"], gate["passed"]) for gate in shown["gates"]] == [
        ("finance-sentiment.macro_f1", True),
        *((f"structure.{check}", True) for check in ("digest", "loadable", "finite", "bucket", "vllm")),
    ]
    card = world.chorus("adapters", "show", f"{FINANCE}@champion", "--card").stdout
    assert card == world.registry.read_text(world.registry.version(FINANCE, "1"), "README.md")
    assert "| structure.finite | no NaN and no infinity | - | yes |" in card
    assert "structure.vllm" in world.chorus("adapters", "show", f"{FINANCE}@champion").stdout


def test_run_of_a_rank_that_is_no_bucket_stays_candidate_where_one_is_asked(world):
    ended = world.chorus("run", world.one_job(evaluation={"structure": ["bucket"]}, lora_r=12))
    assert ended.exit_code == 100
    version = world.registry.version(FINANCE, "candidate")
    assert version.tags["gate.status"] == "failed"
    refused = world.chorus("promote", FINANCE, "candidate")
    assert_one_sentence(refused, 3, "structure: bucket is required to be a rank", "but its rank is 12")


def test_gates_of_a_name_ask_for_structure_of_every_version(world, tmp_path):
    world.chorus("run", world.one_job(lora_r=12, registry={"promote": False}))
    (tmp_path / "gates.yaml").write_text("structure: [bucket]\n")
    assert world.chorus("adapters", "gates", FINANCE, "--file", tmp_path / "gates.yaml").exit_code == 0
    assert world.read("adapters", "gates", FINANCE) == {"structure": ["bucket"]}
    assert_one_sentence(world.chorus("promote", FINANCE, "1"), 3, "its rank is 12")


def test_promote_of_a_version_that_diverged_is_refused_though_no_gate_was_asked(world):
    world.chorus("run", world.one_job(registry={"promote": False}))
    version = world.registry.version(FINANCE, "1")
    stored = world.registry.store / version.model_id
    poison(stored, float("nan"))
    world.registry.rebind(FINANCE, 1)
    assert_one_sentence(world.chorus("promote", FINANCE, "1"), 3, "structure: finite", "holds NaN or Inf")


def test_promote_of_a_version_that_was_overwritten_is_refused(world):
    world.chorus("run", world.one_job(registry={"promote": False}))
    stored = world.registry.store / world.registry.version(FINANCE, "1").model_id
    poison(stored, 1.0)
    assert_one_sentence(world.chorus("promote", FINANCE, "1"), 3, f"{FINANCE}/1 was altered")


def test_recipe_with_a_check_that_is_unknown_is_refused_with_its_line(world):
    result = world.chorus("recipe", "validate", world.one_job(evaluation={"structure": ["vlm"]}))
    assert_one_sentence(result, 2, "structure", "vllm")
