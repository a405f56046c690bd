"""Safetensors written a tensor at a time: the library reads what was asked for, in the bytes it writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

from tests.faults import files_limited_to
from workers import shards
from workers.shards import CODES, Block, Entry, Fill, StoredShard, write_growing, write_shard

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(list(CODES))), max_size=6
)


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def filled_from(tensors: dict[str, Tensor]) -> Fill:
    def fill(block: Block, into: Tensor) -> None:
        into.copy_(tensors[block.name].view(-1)[block.start : block.start + block.elements])

    return fill


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_write_shard_any_tensors_are_read_back_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in wanted.items()}
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    digest = write_shard(path, entries(tensors), filled_from(tensors))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load(path.read_bytes())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_write_shard_tensors_of_one_dtype_have_the_bytes_the_library_writes(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(3, n + 1) for n in range(4)}
    write_shard(tmp_path / "x.safetensors", entries(tensors), filled_from(tensors))
    assert (tmp_path / "x.safetensors").read_bytes() == save(tensors, {"format": "pt"})


def test_write_shard_error_of_a_tensor_reaches_the_caller(tmp_path: Path) -> None:
    def torn(block: Block, into: Tensor) -> None:
        raise OSError(f"{block.name} cannot be read")

    with pytest.raises(OSError, match="t0 cannot be read"):
        write_shard(tmp_path / "x.safetensors", {"t0": Entry((2,), torch.float32)}, torn)


# ---- blocks ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a block, so few that a file has more blocks than there are buffers."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    return 64


def several() -> dict[str, Tensor]:
    return {"long": torch.randn(100, 7), "short": torch.randn(3).bfloat16(), "none": torch.zeros(0, 4)}


def test_write_shard_many_blocks_have_the_bytes_of_one(tmp_path: Path, small_blocks: int) -> None:
    tensors, begun = several(), list[tuple[int, int]]()

    def fill(block: Block, into: Tensor) -> None:
        filled_from(tensors)(block, into)
        begun.append((block.start, into.nbytes))

    digest = write_shard(tmp_path / "x.safetensors", entries(tensors), fill)
    found = load((tmp_path / "x.safetensors").read_bytes())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert len(begun) > 2 * shards.BLOCKS
    assert max(nbytes for _, nbytes in begun) <= small_blocks


@pytest.mark.parametrize("together", [7, 35])
def test_write_shard_rows_that_belong_together_are_in_one_block(
    tmp_path: Path, small_blocks: int, together: int
) -> None:
    tensors, blocks = {"long": torch.randn(100, 7)}, list[Block]()

    def fill(block: Block, into: Tensor) -> None:
        filled_from(tensors)(block, into)
        blocks.append(block)

    write_shard(tmp_path / "x.safetensors", {"long": Entry((100, 7), torch.float32, together)}, fill)
    assert small_blocks < 35 * 4
    assert all(block.start % together == 0 for block in blocks)
    assert all(block.elements % together == 0 for block in blocks[:-1])
    assert load((tmp_path / "x.safetensors").read_bytes())["long"].equal(tensors["long"])


def test_stored_shard_any_stretch_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(9, 5), "b": torch.arange(11), "c": torch.randn(4).bfloat16()}
    (tmp_path / "x.safetensors").write_bytes(save(tensors))
    with StoredShard(tmp_path / "x.safetensors") as stored:
        assert stored.entries == entries(tensors)
        for name, tensor in tensors.items():
            into = torch.empty(3, dtype=tensor.dtype)
            stored.read(name, 1, into)
            assert torch.equal(into, tensor.view(-1)[1:4]), name


def test_stored_shard_that_loses_its_end_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.randn(64)}))
    with StoredShard(path) as stored:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(OSError, match=r"x\.safetensors ended while it was read"):
            stored.read("a", 0, torch.empty(64))


# ---- a file whose tensors come one by one ---------------------------------------------------------------


def test_growing_file_reads_back_with_the_library_and_names_itself_on_a_full_disk(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.arange(7, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "grown.safetensors"
    write_growing(path, 1001, iter(tensors.items()))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with files_limited_to(1040), pytest.raises(OSError, match=r"other\.safetensors"):
        write_growing(tmp_path / "other.safetensors", 1001, iter(tensors.items()))
