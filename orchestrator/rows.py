"""What a row of each task type must hold, checked before anything is started.

Reads data files and nothing else. A host checks again when it loads them (`workers.rows`); a test holds
the two to one opinion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError, model_validator

from workers.manifest import file_digest, json_digest
from workers.types import BadInput, DatasetSpec


@dataclass(frozen=True)
class Split:
    """The data sets one job reads in one role, and what their files held when they were checked."""

    datasets: tuple[DatasetSpec, ...] = ()
    rows: int = 0
    digest: str = json_digest([])
    """SHA-256 over the digests of the files, in order."""


# ---- rows -----------------------------------------------------------------------------------------------


def _has_words(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRow(BaseModel):
    messages: list[Message]

    @model_validator(mode="after")
    def _is_answered(self) -> ChatRow:
        answers = [message.content for message in self.messages if message.role == "assistant"]
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError("messages need an assistant's answer, and no empty one: it is what is learned")
        return self


class ClassificationRow(BaseModel):
    text: str
    label: str


class Seen(BaseModel):
    title: str
    liked: bool = True


class RecommendationRow(BaseModel):
    request: str = ""
    history: list[str | Seen]
    candidates: list[Annotated[str, AfterValidator(_has_words)]]
    target: str

    @model_validator(mode="after")
    def _target_is_a_candidate(self) -> RecommendationRow:
        if len({candidate.strip() for candidate in self.candidates}) != len(self.candidates):
            raise ValueError("a candidate is listed twice")
        if self.target not in self.candidates:
            raise ValueError(f"the target {self.target!r} is not among the candidates")
        return self


_ROWS: dict[str, TypeAdapter[Any]] = {
    "chat": TypeAdapter(ChatRow),
    "classification": TypeAdapter(ClassificationRow),
    "recommendation": TypeAdapter(RecommendationRow),
}


# ---- files ----------------------------------------------------------------------------------------------


def split_file(spec: DatasetSpec) -> Path:
    """The file that holds the split: `path` itself, or `<split>.jsonl` in it when it is a folder."""
    path = Path(spec.path)
    return path / f"{spec.split}.jsonl" if path.is_dir() else path


def check_split(datasets: Sequence[DatasetSpec]) -> Split:
    """Check every row that the data sets would use. Raises BadInput naming file, line and field."""
    rows = sum(_check_file(spec) for spec in datasets)
    digest = json_digest([file_digest(split_file(spec)) for spec in datasets])
    return Split(tuple(datasets), rows, digest)


def _check_file(spec: DatasetSpec) -> int:
    file = split_file(spec)
    rows = 0
    for line in islice(_lines(file), spec.max_samples):
        rows += 1
        _check_row(spec, f"{file}:{rows}", line)
    if rows == 0:
        raise BadInput(f"{file}: holds no rows; put one JSON object on each line")
    return rows


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from error
    return iter(text.split("\n") if text else ())


def _check_row(spec: DatasetSpec, place: str, line: str) -> None:
    try:
        row = _ROWS[spec.type].validate_json(line, strict=True)
    except ValidationError as error:
        raise BadInput(f"{place}: {_words(error)}") from error
    if isinstance(row, ClassificationRow) and row.label not in spec.labels:
        labels = ", ".join(spec.labels)
        raise BadInput(f"{place}: unknown label {row.label!r}; the recipe's labels are {labels}")


def _words(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    words = problem["msg"].replace("Input should", "should", 1).removeprefix("Value error, ")
    match problem["type"]:
        case "json_invalid":
            return f"is not a JSON object ({words.removeprefix('Invalid JSON: ')}); write one on each line"
        case "missing":
            return f"field {field!r} is missing"
        case _:
            return f"field {field!r} {words}" if field else words
