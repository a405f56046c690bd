"""Fusion from folders to a folder: equal bytes, one base, verified inputs, complete or absent."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapters import SHAPES, dense, dense_sum, random_adapter, relative_error
from tests.faults import files_limited_to, run_killed_before_rename
from workers.adapter import Adapter, read_adapter, write_adapter
from workers.fuse import fuse
from workers.manifest import CorruptFolder, folder_files, publish_folder, verify_folder
from workers.task import run
from workers.types import BadInput, FuseTask


def save(adapter: Adapter, folder: Path, base_digest: str = "") -> str:
    with publish_folder(folder, {"base_digest": base_digest} if base_digest else None) as scratch:
        write_adapter(adapter, scratch)
    return str(folder)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    one = random_adapter(1, r=2, lora_alpha=5, use_rslora=True, base_model="tiny")
    down = "model.layers.0.mlp.down_proj"
    shapes = {name: shape for name, shape in SHAPES.items() if not name.endswith("v_proj")}
    other = random_adapter(2, r=4, lora_alpha=8, ranks={down: 3}, base_model="tiny", shapes=shapes)
    return save(one, tmp_path / "one", "d1"), save(other, tmp_path / "other", "d1")


def fusion(sources: tuple[str, ...], out: Path, rule: str = "cat", rank: int | None = None) -> FuseTask:
    return FuseTask(sources, (1.0, 0.5), rule, rank, str(out))


def test_fuse_folders_result_reads_back_as_the_dense_sum(sources: tuple[str, str], tmp_path: Path) -> None:
    report = run(fusion(sources, tmp_path / "fused"))
    fused = read_adapter(tmp_path / "fused")
    parts = [read_adapter(Path(folder)) for folder in sources]
    for name in SHAPES:
        assert relative_error(dense(fused, name), dense_sum(parts, [1.0, 0.5], name)) < 1e-6
    assert fused.base_model == "tiny"
    assert verify_folder(tmp_path / "fused")["base_digest"] == "d1"
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text()) == report


@pytest.mark.parametrize(("rule", "rank"), [("cat", None), ("svd", 3)])
def test_fuse_folders_equal_inputs_elsewhere_give_equal_bytes(
    sources: tuple[str, str], tmp_path: Path, rule: str, rank: int | None
) -> None:
    copies = tuple(save(read_adapter(Path(path)), tmp_path / "copy" / Path(path).name) for path in sources)
    run(fusion(sources, tmp_path / "first", rule, rank))
    run(fusion(copies, tmp_path / "second", rule, rank))
    assert folder_files(tmp_path / "first") == folder_files(tmp_path / "second")


def test_fuse_folders_same_plan_again_changes_nothing(sources: tuple[str, str], tmp_path: Path) -> None:
    first = run(fusion(sources, tmp_path / "fused"))
    inode = (tmp_path / "fused").stat().st_ino
    assert run(fusion(sources, tmp_path / "fused")) == first
    assert (tmp_path / "fused").stat().st_ino == inode


def test_fuse_folders_out_dir_of_another_plan_is_refused(sources: tuple[str, str], tmp_path: Path) -> None:
    run(fusion(sources, tmp_path / "fused"))
    with pytest.raises(BadInput, match="is not the result of this fusion"):
        run(fusion(sources, tmp_path / "fused", "svd", 2))


def test_fuse_folders_altered_input_is_refused(sources: tuple[str, str], tmp_path: Path) -> None:
    path = Path(sources[1]) / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptFolder, match=r"adapter_model\.safetensors does not match"):
        run(fusion(sources, tmp_path / "fused"))
    assert not (tmp_path / "fused").exists()


def test_fuse_folders_other_base_digest_is_refused_under_one_name(
    sources: tuple[str, str], tmp_path: Path
) -> None:
    stranger = save(random_adapter(3, base_model="tiny"), tmp_path / "stranger", "d2")
    with pytest.raises(BadInput, match=r"stranger was trained on base d2 but .*one on d1"):
        run(fusion((sources[0], stranger), tmp_path / "fused"))


def test_fuse_folders_other_base_name_is_refused_where_digests_are_unknown(tmp_path: Path) -> None:
    one = save(random_adapter(1, base_model="tiny"), tmp_path / "one")
    other = save(random_adapter(2, base_model="small"), tmp_path / "other")
    with pytest.raises(BadInput, match="trained on base small"):
        run(fusion((one, other), tmp_path / "fused"))


def test_fuse_folders_other_base_behind_one_without_a_name_is_refused(tmp_path: Path) -> None:
    names = ("tiny", "", "small")
    folders = [save(random_adapter(i, base_model=name), tmp_path / f"a{i}") for i, name in enumerate(names)]
    with pytest.raises(BadInput, match="fuse adapters of one base"):
        run(FuseTask(tuple(folders), (1.0, 1.0, 1.0), "cat", None, str(tmp_path / "fused")))


def test_fuse_folders_same_digest_under_two_names_is_one_base(tmp_path: Path) -> None:
    one = save(random_adapter(1, base_model="recipes/bases/tiny"), tmp_path / "one", "d1")
    other = save(random_adapter(2, base_model="tiny"), tmp_path / "other", "d1")
    run(fusion((one, other), tmp_path / "fused"))
    assert verify_folder(tmp_path / "fused")["base_digest"] == "d1"


def test_fuse_folders_nan_in_a_source_is_refused_naming_folder_and_module(
    sources: tuple[str, str], tmp_path: Path
) -> None:
    adapter = random_adapter(4, base_model="tiny")
    factors = dict(adapter.factors)
    a, b = factors["model.layers.0.self_attn.v_proj"]
    factors["model.layers.0.self_attn.v_proj"] = (torch.full_like(a, torch.nan), b)
    bad = save(replace(adapter, factors=factors), tmp_path / "bad", "d1")
    with pytest.raises(BadInput, match=r"bad: module 'model\.layers\.0\.self_attn\.v_proj' holds NaN"):
        run(fusion((sources[0], bad), tmp_path / "fused"))
    assert not (tmp_path / "fused").exists()


def test_fuse_folders_full_disk_raises_oserror_and_leaves_nothing(
    sources: tuple[str, str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with files_limited_to(1000), pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        run(fusion(sources, tmp_path / "fused"))
    assert sorted(tmp_path.iterdir()) == before


def test_fuse_folders_killed_before_publishing_is_absent_and_can_be_done_again(
    sources: tuple[str, str], tmp_path: Path
) -> None:
    task = fusion(sources, tmp_path / "fused")
    assert run_killed_before_rename(task) == -signal.SIGKILL
    assert not (tmp_path / "fused").exists()
    run(task)
    verify_folder(tmp_path / "fused")


@pytest.mark.parametrize("rule", ["cat", "ties"])
def test_fuse_folders_writes_the_bits_that_fuse_gives(
    sources: tuple[str, str], tmp_path: Path, rule: str
) -> None:
    report = run(fusion(sources, tmp_path / "fused", rule))
    expected, same = fuse([read_adapter(Path(folder)) for folder in sources], (1.0, 0.5), rule)
    found = read_adapter(tmp_path / "fused")
    assert replace(found, factors={}) == replace(expected, factors={}, target_modules=found.target_modules)
    assert report == {**same, "sources": report["sources"]}
    for name, pair in expected.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(found.factors[name], pair, strict=True))
