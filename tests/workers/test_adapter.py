"""PEFT's adapter files: what is written is read back, patterns mean what PEFT means, the rest is refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from tests.adapters import SHAPES, random_adapter
from tests.faults import files_limited_to
from workers.adapter import Adapter, open_adapter, read_adapter, short_names, write_adapter
from workers.adapter_config import pattern_value
from workers.manifest import CorruptFolder, publish_folder
from workers.types import BadInput

Q, V, DOWN = SHAPES
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(adapter: Adapter, folder: Path, **config: Any) -> Path:
    """Write the adapter, with some keys of its configuration changed."""
    folder.mkdir()
    write_adapter(adapter, folder)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def equal(one: Adapter, other: Adapter) -> bool:
    pairs = ((one.factors[name], other.factors[name]) for name in one.factors)
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(x, y) and x.dtype == y.dtype
        for mine, theirs in pairs
        for x, y in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_write_adapter_is_read_back_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = random_adapter(
        1, 4, 6.5, True, {V: 2}, dtype=dtype, alpha_pattern={Q: 3}, base_model="tiny", lora_dropout=0.1
    )
    found = read_adapter(save(adapter, tmp_path / "a"))
    assert equal(found, adapter)
    assert (found.r, found.lora_alpha, found.use_rslora, found.lora_dropout) == (4, 6.5, True, 0.1)
    assert (found.rank_pattern, found.alpha_pattern, found.base_model) == ({V: 2}, {Q: 3}, "tiny")
    assert [found.scaling(name) for name in SHAPES] == [3 / 2, 6.5 / 2**0.5, 6.5 / 2]


def test_write_adapter_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    adapter = random_adapter(1, ranks={V: 2})
    reverse = Adapter(dict(reversed(adapter.factors.items())), adapter.r, adapter.lora_alpha)
    one, other = save(adapter, tmp_path / "one"), save(reverse, tmp_path / "other")
    for name in (CONFIG, WEIGHTS):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_write_adapter_factors_that_are_views_of_one_buffer_are_written_whole(tmp_path: Path) -> None:
    buffer = torch.arange(64.0)
    views = Adapter({Q: (buffer[:20].view(2, 10), buffer[20:44].view(12, 2))}, 2, 2)
    assert equal(read_adapter(save(views, tmp_path / "a")), views)


def test_write_adapter_whole_alpha_is_written_as_an_integer(tmp_path: Path) -> None:
    folder = save(random_adapter(1, lora_alpha=16.0), tmp_path / "a")
    assert '"lora_alpha": 16,' in (folder / CONFIG).read_text().replace("\n", "")


def test_write_adapter_full_disk_raises_oserror(tmp_path: Path) -> None:
    with files_limited_to(500), pytest.raises(OSError, match="adapter_model") as caught:
        write_adapter(random_adapter(1), tmp_path)
    assert caught.value.errno == 27


def test_write_adapter_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """A server runs as another user than who released; safetensors alone would lock it out."""
    before = os.umask(0o022)
    try:
        write_adapter(random_adapter(1), tmp_path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG, WEIGHTS)] == [0o644] * 2


def test_write_adapter_name_that_ends_like_another_keeps_its_rank_apart(tmp_path: Path) -> None:
    shapes = {"layers.0.q": (4, 4), "vision.layers.0.q": (4, 4)}
    folder = save(random_adapter(1, 3, ranks={"layers.0.q": 1}, shapes=shapes), tmp_path / "a")
    assert read_adapter(folder).rank_pattern == {"layers.0.q": 1}


parts = st.sampled_from(["a", "b", "ab", "layers", "0", "1", "q_proj"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)
patterns = st.sampled_from(
    ["q_proj", "a.q_proj", "^a.q_proj", "layers.[0-1].*", "b", ".*ab", "0.q_proj", "a"]
)


@given(st.lists(patterns, unique=True), names)
def test_pattern_value_finds_what_peft_finds(keys: list[str], name: str) -> None:
    pattern = {key: float(index) for index, key in enumerate(keys)}
    assert pattern_value(pattern, name) == pattern.get(get_pattern_key(list(pattern), name))


def test_short_names_selects_the_same_modules() -> None:
    every = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    every.append("lm_head")
    assert short_names(every[:-1], every) == ("q_proj", "up_proj")
    assert short_names(every[:3], every) == (
        *("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"),
        "model.layers.1.self_attn.q_proj",
    )


def test_read_adapter_with_a_manifest_refuses_altered_bytes(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "a") as scratch:
        write_adapter(random_adapter(1), scratch)
    (tmp_path / "a" / "README.md").write_text("a card added later is not the adapter")
    read_adapter(tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(path.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(CorruptFolder, match=CONFIG):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"use_dora": True}, "'use_dora' is True.*merge_and_unload"),
        ({"bias": "lora_only"}, "bias: none"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"modules_to_save": ["lm_head"]}, "without modules_to_save"),
        ({"fan_in_fan_out": True}, "linear layers, not Conv1D"),
        ({"trainable_token_indices": [1]}, "without trainable_token_indices"),
        ({"a_key_of_a_later_peft": {"x": 1}}, "'a_key_of_a_later_peft' is .* not plain LoRA"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa' changes the base; .*path_initial_model_for_weight_conversion",
        ),
        ({"r": 5}, "should have rank 5 but its tensors have 3; put the true rank into rank_pattern"),
        ({"r": "8"}, "'r' is '8'; it must be a number above 0"),
        ({"r": float("nan")}, "'r' is nan; it must be a number above 0"),
        ({"lora_alpha": float("inf")}, "'lora_alpha' is inf; it must be a number above 0"),
        ({"rank_pattern": ["q_proj"]}, r"'rank_pattern' is \['q_proj'\]; .* module names to numbers above 0"),
        ({"rank_pattern": {"q_proj": "8"}}, "'rank_pattern' .* module names to numbers above 0"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' in alpha_pattern is not a regular expression"),
        ({"lora_dropout": "x"}, "'lora_dropout' is 'x'; it must be a number from 0 to 1"),
        (
            {"target_modules": [1, "q"]},
            r"'target_modules' is \[1, 'q'\]; it must be a name or a list of names",
        ),
        ({"base_model_name_or_path": 7}, "'base_model_name_or_path' is 7; it must be a name"),
    ],
)
def test_read_adapter_what_is_not_plain_lora_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    folder = save(random_adapter(1), tmp_path / "a", **config)
    for read in (read_adapter, open_adapter):
        with pytest.raises(BadInput, match=words):
            read(folder)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"base_model.model.{Q}.lora_magnitude_vector", (12,), "is not a factor of a linear layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (3, 8), "is not a factor"),
        (f"base_model.model.{Q}.lora_B.bias", (12,), "is not a factor"),
        ("base_model.model.lone.lora_A.weight", (3, 8), "module 'lone' do not pair up"),
        (f"base_model.model.{Q}.lora_B.weight", (12, 2), "do not pair up"),
        (f"base_model.model.{Q}.lora_B.weight", (12, 3, 1, 1), "is not a factor of a linear layer"),
    ],
)
def test_read_adapter_tensor_that_does_not_belong_is_refused(
    tmp_path: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    folder = save(random_adapter(1), tmp_path / "a")
    save_file({**load_file(folder / WEIGHTS), key: torch.zeros(shape)}, folder / WEIGHTS)
    with pytest.raises(BadInput, match=words):
        read_adapter(folder)


def test_read_adapter_in_eight_bits_is_refused_by_its_tensor(tmp_path: Path) -> None:
    folder = save(random_adapter(1), tmp_path / "a")
    eight = {key: x.to(torch.float8_e4m3fn) for key, x in load_file(folder / WEIGHTS).items()}
    save_file(eight, folder / WEIGHTS)
    for read in (read_adapter, open_adapter):
        with pytest.raises(BadInput, match=r"lora_[AB].weight' .*(float8_e4m3fn|F8_E4M3)"):
            read(folder)


def test_read_adapter_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not an adapter: it has no adapter_config\.json"):
        read_adapter(tmp_path / "nowhere")
    folder = save(random_adapter(1), tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="safe_serialization=True"):
        read_adapter(folder)


@pytest.mark.parametrize("size", [0, 100, -50])
def test_read_adapter_torn_file_is_refused(tmp_path: Path, size: int) -> None:
    path = save(random_adapter(1), tmp_path / "a") / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match="is not a whole safetensors file"):
        read_adapter(tmp_path / "a")
