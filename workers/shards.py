"""Safetensors files written one tensor at a time: memory is that of two tensors, whatever the file's size.

The library writes a file from all its tensors at once, in memory. The format is 8 bytes of header length, a
JSON header with each tensor's dtype, shape and place, then the bytes of the tensors in that order; reading is
the library's. SHA-256 is taken of the bytes on their way to the disk, beside the next tensor's arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
ALIGNED = 8
WRITTEN_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def write_shard(path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor]) -> str:
    """Write `path` from `tensor(name)`, asked for in the order of `entries`; the file's SHA-256.

    Equal tensors give equal bytes. One tensor is computed while the one before it is written. Raises OSError
    naming the file if it cannot be written whole.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:

        def put(data: bytes | memoryview) -> None:
            for start in range(0, len(data), WRITTEN_AT_ONCE):
                piece = data[start : start + WRITTEN_AT_ONCE]
                digest.update(piece)
                _write(file, piece)

        under_way: Future[None] = writer.submit(put, _header(entries))
        for name, entry in entries.items():
            found = tensor(name)
            assert (tuple(found.shape), found.dtype) == (entry.shape, entry.dtype), name
            data = _bytes(found)
            under_way.result()
            under_way = writer.submit(put, data)
            del found, data
        under_way.result()
    return digest.hexdigest()


def write_growing(path: Path, room: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `path` from tensors whose shapes nobody knows before they come; `room` bytes hold the header.

    Equal tensors in the same order give equal bytes. Raises OSError naming the file if it cannot be written
    whole; what `tensors` raises is left as it is.
    """
    entries: dict[str, Entry] = {}
    room += -room % ALIGNED
    with path.open("wb", buffering=0) as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            entries[name] = Entry(tuple(tensor.shape), tensor.dtype)
            _write(file, _bytes(tensor))
        header = _header(entries, room)
        assert len(header) == 8 + room, "the header is larger than its room"
        file.seek(0)
        _write(file, header)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    """All of it. A buffer would be written once more, and fail once more, when the file is closed."""
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(entries: Mapping[str, Entry], room: int = 0) -> bytes:
    """Of `room` bytes at least, beside its length."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(room)
    text += b" " * (-len(text) % ALIGNED)
    return struct.pack("<Q", len(text)) + text
