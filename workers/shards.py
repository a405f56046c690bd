"""Safetensors files written and read in blocks: memory is that of a few blocks, whatever the file's size.

The library writes a file from all its tensors at once, in memory, and reads by mapping the file. The format
is 8 bytes of header length, a JSON header with each tensor's dtype, shape and place, then the bytes of the
tensors in that order. While a block is filled, those before it are hashed by a second thread and written by a
third, which both let go of Python's lock, and the system fetches what is read next.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.types import BadInput

CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
ALIGNED = 8
BLOCK_BYTES = 1 << 24
BLOCKS = 6
"""In memory at once: one is filled, the others are on their way to digest and disk."""
READ_AHEAD = 4 * BLOCK_BYTES


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    together: int = 1
    """Elements that are filled together: every block begins at a multiple of so many."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Elements of a tensor that follow one another in row-major order."""

    name: str
    start: int
    elements: int


Fill = Callable[[Block, Tensor], None]
"""Writes a block's elements into a flat tensor of its tensor's dtype, [elements]."""


# ---- writing --------------------------------------------------------------------------------------------


def write_shard(path: Path, entries: Mapping[str, Entry], fill: Fill) -> str:
    """Write `path` from the blocks that `fill` fills, in the order of `entries`; the file's SHA-256.

    Equal tensors give equal bytes. The file is on the disk when this returns. Raises OSError naming the file
    if it cannot be written whole.
    """
    header = _header(entries)
    digest = hashlib.sha256(header)
    blocks = [block for name, entry in entries.items() for block in _blocks(name, entry)]
    size = max((_nbytes(block, entries) for block in blocks), default=0)
    under_way = deque[_UnderWay]()
    with _opened(path) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as writing:
        _write(file, memoryview(header))
        for block in blocks:
            full = len(under_way) == BLOCKS - 1
            buffer = under_way.popleft().arrived() if full else torch.empty(size, dtype=torch.uint8)
            part = buffer[: _nbytes(block, entries)]
            fill(block, part.view(entries[block.name].dtype))
            data = memoryview(part.numpy())
            digested, written = hashing.submit(digest.update, data), writing.submit(_write, file, data)
            under_way.append(_UnderWay(buffer, digested, written))
        for last in under_way:
            last.arrived()
    return digest.hexdigest()


@dataclass(frozen=True)
class _UnderWay:
    buffer: Tensor
    digested: Future[None]
    written: Future[None]

    def arrived(self) -> Tensor:
        """The buffer, once nobody reads it any more. Raises what a thread raised."""
        self.digested.result()
        self.written.result()
        return self.buffer


def _blocks(name: str, entry: Entry) -> Iterator[Block]:
    elements = prod(entry.shape)
    most = max(1, BLOCK_BYTES // (entry.together * entry.dtype.itemsize)) * entry.together
    for start in range(0, elements, most):
        yield Block(name, start, min(most, elements - start))


def _nbytes(block: Block, entries: Mapping[str, Entry]) -> int:
    return block.elements * entries[block.name].dtype.itemsize


@contextmanager
def _opened(path: Path) -> Generator[FileIO]:
    """A new file, fsynced at the end."""
    with path.open("wb", buffering=0) as file:
        yield file
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


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
            _write(file, memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        header = _header(entries, room)
        assert len(header) == 8 + room, "the header is larger than its room"
        file.seek(0)
        _write(file, memoryview(header))


def _write(file: FileIO, data: memoryview) -> None:
    """All of it. A buffer would be written once more, and fail once more, when the file is closed."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


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


# ---- reading --------------------------------------------------------------------------------------------


def stored_entries(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor -> its dtype, in the format's words, and its shape. Raises BadInput if the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()}
    except SafetensorError as error:
        raise not_whole(path, error) from error


def not_whole(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path} is not a whole safetensors file ({error}); copy or save it again")


def dtype_of(path: Path, name: str, code: str) -> torch.dtype:
    """Raises BadInput naming the tensor if numbers of that kind are not computed with."""
    if code not in DTYPES:
        raise BadInput(f"{path}: tensor '{name}' is stored as {code}; save it in 16 bits or more")
    return DTYPES[code]


class StoredShard:
    """A file of a base, read in blocks without being mapped: what was read stays nobody's memory."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput for a file that is not whole, or a tensor of a kind that is not known."""
        self.entries = {
            name: Entry(shape, dtype_of(path, name, code))
            for name, (code, shape) in stored_entries(path).items()
        }
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._begins = self._read_begins()

    def _read_begins(self) -> dict[str, int]:
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(length))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in self.entries}

    def __enter__(self) -> StoredShard:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, start: int, into: Tensor) -> None:
        """The elements of `name` from `start` on into a flat tensor of its dtype. Raises OSError."""
        descriptor, place = self._file.fileno(), self._begins[name] + start * into.dtype.itemsize
        data = memoryview(into.view(torch.uint8).numpy())
        os.posix_fadvise(descriptor, place + len(data), READ_AHEAD, os.POSIX_FADV_WILLNEED)
        while data:
            count = os.preadv(descriptor, [data], place)
            if not count:
                raise OSError(f"{self._path} ended while it was read; copy or download the base again")
            data, place = data[count:], place + count
