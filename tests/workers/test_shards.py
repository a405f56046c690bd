"""Safetensors written a tensor at a time: the library reads what was asked for, in the bytes it writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

from tests.faults import files_limited_to
from workers.shards import CODES, Entry, write_growing, write_shard

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(list(CODES))), max_size=6
)


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_write_shard_any_tensors_are_read_back_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in wanted.items()}
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    digest = write_shard(path, entries(tensors), tensors.__getitem__)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load(path.read_bytes())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_write_shard_tensors_of_one_dtype_have_the_bytes_the_library_writes(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(3, n + 1) for n in range(4)}
    write_shard(tmp_path / "x.safetensors", entries(tensors), tensors.__getitem__)
    assert (tmp_path / "x.safetensors").read_bytes() == save(tensors, {"format": "pt"})


def test_write_shard_error_of_a_tensor_reaches_the_caller(tmp_path: Path) -> None:
    def torn(name: str) -> Tensor:
        raise OSError(f"{name} cannot be read")

    with pytest.raises(OSError, match="t0 cannot be read"):
        write_shard(tmp_path / "x.safetensors", {"t0": Entry((2,), torch.float32)}, torn)


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
