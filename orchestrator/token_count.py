"""About how many tokens a row has, without loading a model: for `chorus plan` only.

The host's own count (`workers.data`) is exact; this one renders messages without the chat template's frame.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.rows import split_file
from workers.types import DatasetSpec

SAMPLE = 500
"""Rows of each data set that are counted; the others are taken to be like them."""
FRAME = 4
"""Tokens that a chat template puts around one message: begin, role, line feed, end."""


def tokens_per_row(base: str, datasets: Sequence[DatasetSpec], sequence_len: int) -> float | None:
    """Mean tokens of a row, cut at `sequence_len`; None if `base` has no tokenizer.json that can be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(Path(base) / "tokenizer.json"))
    except Exception:
        # The library raises plain Exception; a plan without this figure is still a plan.
        return None
    counts: list[int] = []
    for dataset in datasets:
        for messages in islice(_rows(dataset), SAMPLE):
            encoded = tokenizer.encode_batch(messages, add_special_tokens=False)
            counts.append(min(sequence_len, sum(len(one.ids) + FRAME for one in encoded)))
    return sum(counts) / len(counts) if counts else None


def _rows(dataset: DatasetSpec) -> Iterator[list[str]]:
    """The messages of every row that the job would use."""
    with split_file(dataset).open(encoding="utf-8-sig") as file:
        for line in islice(file, dataset.max_samples):
            if line.strip():
                system = [dataset.instruction] if dataset.instruction else []
                yield [*system, *_messages(json.loads(line))]


def _messages(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "history" in row:
        titles = [item if isinstance(item, str) else item["title"] for item in row["history"]]
        return ["\n".join([row.get("request", ""), *(f"liked: {title}" for title in titles)]), row["target"]]
    return [row["text"], row["label"]]
