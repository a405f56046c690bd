"""Task data as written by people: read one split, refuse bad rows by file and line, and word them as chat.

No tokenizer here and no torch: `workers.data` turns these rows into tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from workers.types import BadInput, DatasetSpec

ROLES = ("system", "user", "assistant")
WORDS: dict[type, str] = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
"""What JSON's values are called."""


@dataclass(frozen=True)
class Row:
    """One row in tokens. `labels[i]` is `input_ids[i]` where it is learned, else -100 (not shifted)."""

    sample: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def longest_row(config: Any) -> int:
    """Most tokens a row may have on a model of this Hugging Face configuration: its text part says so."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))


def dataset_file(spec: DatasetSpec) -> Path:
    """The .jsonl file of a split. Raises BadInput if it is not there."""
    path = Path(spec.path)
    if path.is_dir():
        file = path / f"{spec.split}.jsonl"
        if file.is_file():
            return file
        splits = ", ".join(sorted(other.stem for other in path.glob("*.jsonl"))) or "none"
        raise BadInput(
            f"{path}: split '{spec.split}' has no file {file.name}; the folder's splits are: {splits}"
        )
    if not path.is_file():
        raise BadInput(f"{path}: no such data file or folder; correct datasets.path")
    return path


def read_rows(spec: DatasetSpec) -> list[dict[str, Any]]:
    """The first `max_samples` rows of a split, checked; row i stands on line i + 1.

    Raises BadInput, naming file, line and field, for anything that is not a row of the data set's type.
    """
    file = dataset_file(spec)
    if spec.type == "classification" and not spec.labels:
        raise BadInput(f"{file}: datasets.labels is empty; a classification data set must list its labels")
    text = _read_text(file).rstrip()
    lines = islice(text.split("\n"), spec.max_samples) if text else ()
    rows = [_read_row(spec, line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if not rows:
        raise BadInput(f"{file}: holds no rows; give it at least one")
    return rows


def messages(spec: DatasetSpec, row: dict[str, Any]) -> list[dict[str, str]]:
    """A row as chat messages; the assistant's are what is learned. Candidates are not in the prompt."""
    system = [{"role": "system", "content": spec.instruction}] if spec.instruction else []
    if spec.type == "chat":
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        return turns if turns[0]["role"] == "system" else system + turns
    if spec.type == "classification":
        return [*system, *_exchange(row["text"], row["label"])]
    return [*system, *_exchange(_history(row), row["target"])]


def data_digest(specs: Sequence[DatasetSpec]) -> str:
    """SHA-256 over the bytes of the files that `specs` read, in order."""
    digest = hashlib.sha256()
    for spec in specs:
        with dataset_file(spec).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _history(row: dict[str, Any]) -> str:
    """The request, if there is one, then a line for every item the user met."""
    lines = [row["request"]] if row.get("request") else []
    for item in row["history"]:
        title, liked = (item, True) if isinstance(item, str) else (item["title"], item.get("liked", True))
        lines.append(f"{'liked' if liked else 'disliked'}: {title}")
    return "\n".join(lines)


# ---- checks of one line -----------------------------------------------------------------------------


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); check its permissions") from error


def _read_row(spec: DatasetSpec, line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is not a JSON object ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where}: is {WORDS[type(row)]}, not an object; write one object a line")
    {"chat": _check_chat, "classification": _check_classification, "recommendation": _check_recommendation}[
        spec.type
    ](spec, row, where)
    return row


def _check_chat(spec: DatasetSpec, row: dict[str, Any], where: str) -> None:  # noqa: ARG001
    turns = _field(row, "messages", list, where)
    for number, turn in enumerate(turns):
        place = f"{where}: messages[{number}]"
        if not isinstance(turn, dict):
            raise BadInput(f"{place} is not an object; it needs 'role' and 'content'")
        role = _field(turn, "role", str, place)
        if role not in ROLES:
            raise BadInput(f"{place}: unknown role '{role}'; use one of {', '.join(ROLES)}")
        content = _field(turn, "content", str, place)
        if role == "assistant" and not content.strip():
            raise BadInput(f"{place}: the assistant's content is empty; there is nothing to learn from it")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadInput(f"{where}: messages has no assistant message; there is nothing to learn from it")


def _check_classification(spec: DatasetSpec, row: dict[str, Any], where: str) -> None:
    _field(row, "text", str, where)
    label = _field(row, "label", str, where)
    if label not in spec.labels:
        raise BadInput(f"{where}: unknown label '{label}'; datasets.labels allows {', '.join(spec.labels)}")


def _check_recommendation(spec: DatasetSpec, row: dict[str, Any], where: str) -> None:  # noqa: ARG001
    if "request" in row:
        _field(row, "request", str, where)
    for number, item in enumerate(_field(row, "history", list, where)):
        if not isinstance(item, str):
            _check_history_item(item, f"{where}: history[{number}]")
    candidates = _field(row, "candidates", list, where)
    seen: set[str] = set()
    for candidate in candidates:
        if not isinstance(candidate, str) or not candidate.strip():
            raise BadInput(f"{where}: candidate {candidate!r} is not a title; use a non-empty string")
        if candidate.strip() in seen:
            raise BadInput(f"{where}: candidate '{candidate.strip()}' occurs twice; list each once")
        seen.add(candidate.strip())
    target = _field(row, "target", str, where)
    if target not in candidates:
        raise BadInput(f"{where}: target '{target}' is not among the candidates; add it to them")


def _check_history_item(item: Any, place: str) -> None:
    if not isinstance(item, dict):
        raise BadInput(f'{place} is neither a title nor {{"title", "liked"}}; use one of the two')
    _field(item, "title", str, place)
    if "liked" in item:
        _field(item, "liked", bool, place)


def _field(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in row:
        raise BadInput(f"{where}: field '{name}' is missing; add it as {WORDS[kind]}")
    if not isinstance(row[name], kind):
        raise BadInput(f"{where}: field '{name}' is {WORDS[type(row[name])]}; it must be {WORDS[kind]}")
    return row[name]
