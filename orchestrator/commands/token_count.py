"""About how many tokens a row has, without loading a model: for `chorus plan` only.

The host's own count (`workers.data`) is exact; this one renders messages without the chat template's frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workers.rows import messages, read_rows
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
        for row in read_rows(dataset)[:SAMPLE]:
            words = [message["content"] for message in messages(dataset, row)]
            encoded = tokenizer.encode_batch(words, add_special_tokens=False)
            counts.append(min(sequence_len, sum(len(one.ids) + FRAME for one in encoded)))
    return sum(counts) / len(counts) if counts else None
