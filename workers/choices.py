"""A prompt and the answers it could have: every label of a classification row, every candidate of a list.

Tokens are those that training sees: the prompt's from the row as trained, an answer's from its place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workers.data import IGNORE, Rendered, control_tokens, encode_rendered, refuse_control_tokens, render_all
from workers.types import BadInput, DatasetSpec


@dataclass(frozen=True)
class Choice:
    """One prompt and its possible answers in tokens; each answer ends with the token that ends a turn."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def answers_of(spec: DatasetSpec, row: dict[str, Any]) -> Sequence[str]:
    """What the assistant could say to a row: the label words, or the row's candidates."""
    return spec.labels if spec.type == "classification" else row["candidates"]


def encode_choices(
    tokenizer: Any, spec: DatasetSpec, rows: Sequence[dict[str, Any]], sequence_len: int
) -> list[Choice]:
    """Every row's prompt and answers. Raises BadInput for a row that does not fit `sequence_len`."""
    rendered = render_all(tokenizer, spec, rows)
    encoded = encode_rendered(tokenizer, spec, rendered, 0, sequence_len)
    texts = [
        _in_place(tokenizer, page, answers_of(spec, row)) for page, row in zip(rendered, rows, strict=True)
    ]
    tokens = _tokenise(tokenizer, {text for row in texts for text in row})
    choices = []
    for page, row, answers in zip(rendered, encoded, texts, strict=True):
        start = next(i for i, label in enumerate(row.labels) if label != IGNORE)
        choice = Choice(row.input_ids[:start], tuple(tokens[text] for text in answers))
        longest = start + max(len(answer) for answer in choice.answers)
        if longest > sequence_len:
            raise BadInput(
                f"{page.where}: the row has {longest} tokens with its longest answer; "
                f"raise sequence_len, which is {sequence_len}"
            )
        choices.append(choice)
    return choices


def _in_place(tokenizer: Any, page: Rendered, answers: Sequence[str]) -> list[tuple[str, str]]:
    """(what comes before, the answer and its end), as text, for each answer.

    Nothing joins with a control token, so the last one before the answer is as far back as one must look.
    """
    span = page.spans[-1]
    anchor = max((0, *(page.text.rfind(token, 0, span.start) for token in control_tokens(tokenizer))))
    lead, end = page.text[span.start : span.content], page.text[span.tail : span.stop]
    for answer in answers:
        refuse_control_tokens(tokenizer, answer, "the answer", page.where)
    return [(page.text[anchor : span.start], lead + answer.strip() + end) for answer in answers]


def _tokenise(tokenizer: Any, texts: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The tokens of each distinct answer, once: labels and titles recur from row to row."""
    ordered = sorted(texts)
    encoded = tokenizer(
        [before + answer for before, answer in ordered], add_special_tokens=False, return_offsets_mapping=True
    )
    tokens = {}
    for text, ids, offsets in zip(ordered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > len(text[0]))
        tokens[text] = tuple(ids[first:])
    return tokens
