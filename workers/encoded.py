"""A job's rows in tokens: which data it draws from, and how they pass from the process that encodes them.

`Encoded` rows are made in place as lists, or read from a file as arrays that give a `Row` when asked for one:
five bytes a token instead of some forty. No torch: the process that encodes does without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from workers.data import IGNORE, encode_all
from workers.rows import Row, dataset_file
from workers.types import BadInput, DatasetSpec, JobSpec

Datasets = tuple[DatasetSpec, ...]
Source = tuple[Datasets, Datasets]
"""What a course learns, and what it is validated on."""


@dataclass(frozen=True)
class Encoded:
    """A source in tokens. Samples of `train` are numbered over all courses of the job."""

    train: Sequence[Row]
    validation: Sequence[Row]


def sources(spec: JobSpec) -> tuple[Source, ...]:
    """One of a plain job, one for each teacher of a distillation."""
    if spec.distill is None:
        return ((spec.train, spec.validation),)
    return tuple((teacher.train, teacher.validation) for teacher in spec.distill.teachers)


def size_of(spec: JobSpec) -> int:
    """Bytes of the files it draws from; those that are not there count nothing."""
    files = [data for source in sources(spec) for datasets in source for data in datasets]
    return sum(map(_file_size, files))


def _file_size(data: DatasetSpec) -> int:
    try:
        return dataset_file(data).stat().st_size
    except (BadInput, OSError):
        return 0


def encode(tokenizer: Any, of: Sequence[Source], sequence_len: int) -> list[Encoded]:
    """Raises BadInput for rows that cannot be used, OSError for files that cannot be read."""
    courses: list[Encoded] = []
    first = 0
    for train, validation in of:
        rows = encode_all(tokenizer, train, sequence_len)
        numbered = [replace(row, sample=row.sample + first) for row in rows] if first else rows
        courses.append(Encoded(numbered, encode_all(tokenizer, validation, sequence_len)))
        first += len(rows)
    return courses


def cannot_start(error: Exception) -> BadInput:
    """Whatever else one job brings along, in one sentence."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return BadInput(f"the job cannot start ({words}); correct its recipe or its data")


# ---- as a file --------------------------------------------------------------------------------------------


class Rows(Sequence[Row]):
    """Rows as arrays over all tokens n: `ids` and `learned` [n], and where each row ends."""

    def __init__(
        self, ids: NDArray[np.int32], learned: NDArray[np.bool_], ends: NDArray[np.int64], first: int
    ) -> None:
        self._ids, self._learned, self._ends, self._first = ids, learned, ends, first

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(at) for at in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, range(len(self)))

    def _row(self, at: int) -> Row:
        start, stop = int(self._ends[at - 1]) if at else 0, int(self._ends[at])
        ids, learned = self._ids[start:stop], self._learned[start:stop]
        labels = np.where(learned, ids, IGNORE)
        return Row(self._first + at, tuple(ids.tolist()), tuple(labels.tolist()))


def write(path: Path, courses: Sequence[Encoded]) -> None:
    """Raises OSError."""
    tensors = {
        f"{number}.{split}.{name}": array
        for number, course in enumerate(courses)
        for split, rows in (("train", course.train), ("validation", course.validation))
        for name, array in _arrays(rows).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors))


def _arrays(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    lengths = [len(row.input_ids) for row in rows]
    labels = np.fromiter((label for row in rows for label in row.labels), np.int32, sum(lengths))
    return {
        "ids": np.fromiter((token for row in rows for token in row.input_ids), np.int32, sum(lengths)),
        "learned": labels != IGNORE,
        "ends": np.cumsum(lengths, dtype=np.int64),
    }


def read(path: Path, courses: int) -> list[Encoded]:
    """What `write` has written, in memory. Raises OSError if the file is not there."""
    path.stat()  # safetensors words this in its own way
    arrays = load_file(path)
    found: list[Encoded] = []
    first = 0
    for number in range(courses):
        train, validation = (
            Rows(*(arrays[f"{number}.{split}.{name}"] for name in ("ids", "learned", "ends")), start)
            for split, start in (("train", first), ("validation", 0))
        )
        found.append(Encoded(train, validation))
        first += len(train)
    return found
