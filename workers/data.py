"""Task rows in tokens: render with the tokenizer's own chat template, mark what is learned, fit the length.

Reading and checking rows is `workers.rows`; the order of samples is `workers.order`; both are offered here
too, so that a trainer imports one module. Rendering goes through transformers, which sandboxes templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError

from workers.order import batch_samples, epoch_order, num_steps, steps_per_epoch
from workers.rows import Row, data_digest, dataset_file, messages, read_rows
from workers.types import BadInput, DatasetSpec

__all__ = [
    "Row",
    "batch_samples",
    "data_digest",
    "encode",
    "encode_all",
    "epoch_order",
    "messages",
    "num_steps",
    "read_rows",
    "steps_per_epoch",
]

IGNORE = -100
PLACEHOLDER = "\ue000"
"""A character of Unicode's private use area."""
ROWS_PER_CALL = 1024
"""Rows tokenised at once: enough to keep the tokenizer's threads busy, little enough to hold offsets of."""

UNSTABLE = (
    "{where}: the base's chat template renders the beginning of a conversation differently from the whole, "
    "so the assistant's part cannot be found; use a template that only appends"
)
JOINED = (
    "{where}: the base's chat template and tokenizer join the end of the prompt and the start of the answer "
    "in one token; use a template that puts a control token or a line break between them"
)


@dataclass(frozen=True)
class Span:
    """Characters of one assistant turn: [start, stop) is learned, the message itself is [content, tail)."""

    start: int
    content: int
    tail: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and its assistant turns."""

    text: str
    spans: tuple[Span, ...]
    where: str


def encode_all(tokenizer: Any, specs: Sequence[DatasetSpec], sequence_len: int) -> list[Row]:
    """Every row of `specs` in tokens, `sample` counting over all of them. Raises BadInput."""
    rows: list[Row] = []
    for spec in specs:
        rendered = render_all(tokenizer, spec, read_rows(spec))
        for start in range(0, len(rendered), ROWS_PER_CALL):
            part = rendered[start : start + ROWS_PER_CALL]
            rows += encode_rendered(tokenizer, spec, part, len(rows), sequence_len)
    return rows


def encode(tokenizer: Any, spec: DatasetSpec, row: dict[str, Any], sample: int, sequence_len: int) -> Row:
    """One row in tokens; labels are the assistant's tokens and the token that ends each turn.

    A chat longer than `sequence_len` loses its end; an answer of the other types is never cut.
    Raises BadInput if no target is left, or an answer does not fit.
    """
    rendered = render(tokenizer, messages(spec, row), f"row {sample}")
    return encode_rendered(tokenizer, spec, [rendered], sample, sequence_len)[0]


def render_all(tokenizer: Any, spec: DatasetSpec, rows: Sequence[dict[str, Any]]) -> list[Rendered]:
    """Rows as `read_rows` gave them, rendered; errors name the line."""
    file = dataset_file(spec)
    return [render(tokenizer, messages(spec, row), f"{file}:{line}") for line, row in enumerate(rows, 1)]


def render(tokenizer: Any, turns: Sequence[dict[str, str]], where: str) -> Rendered:
    """Render a conversation and find its assistant turns by rendering what comes before each.

    Raises BadInput if a message holds a control token, or the template refuses the conversation or renders
    its beginning differently from the whole.
    """
    for turn in turns:
        refuse_control_tokens(tokenizer, turn["content"], f"the {turn['role']} message", where)
    text = apply_template(tokenizer, turns, where)
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = _before(tokenizer, turns, index, where)
            spans.append(_span(text, before, turn["content"].strip(), control_tokens(tokenizer), where))
    if any(later.start < earlier.stop for earlier, later in pairwise(spans)):
        raise BadInput(UNSTABLE.format(where=where))
    return Rendered(text, tuple(spans), where)


def apply_template(tokenizer: Any, turns: Sequence[dict[str, str]], where: str, ask: bool = False) -> str:
    """The conversation as text; with `ask`, up to where the assistant's answer begins. Raises BadInput."""
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
    except (TemplateError, ValueError) as error:
        raise BadInput(f"{where}: the base's chat template cannot render the row: {error}") from error


@lru_cache(maxsize=4)
def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that steer a model; in a message's own text they would be read as the template's."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys(token for token in (*tokenizer.all_special_tokens, *added) if token.strip()))


def refuse_control_tokens(tokenizer: Any, content: str, what: str, where: str) -> None:
    """Raises BadInput if the text of a row holds a control token."""
    if found := next((token for token in control_tokens(tokenizer) if token in content), None):
        raise BadInput(f"{where}: {what} holds the control token {found}; take it out")


def _before(tokenizer: Any, turns: Sequence[dict[str, str]], index: int, where: str) -> str:
    """What the template writes before the content of turn `index`."""
    if index:
        return apply_template(tokenizer, turns[:index], where, ask=True)
    # Templates do not render an empty conversation; write another content in its place and cut there.
    return apply_template(tokenizer, [{**turns[0], "content": PLACEHOLDER}], where).partition(PLACEHOLDER)[0]


def _span(text: str, before: str, content: str, control: tuple[str, ...], where: str) -> Span:
    start = text.find(content, len(before))
    if not text.startswith(before) or start < 0:
        raise BadInput(UNSTABLE.format(where=where))
    tail = start + len(content)
    gap = text[tail:].lstrip()
    ends = next((token for token in control if gap.startswith(token)), "")
    stop = len(text) - len(gap) + len(ends) if ends else tail
    return Span(len(before), start, tail, stop)


def encode_rendered(
    tokenizer: Any, spec: DatasetSpec, rendered: Sequence[Rendered], first: int, sequence_len: int
) -> list[Row]:
    """Rendered rows in tokens, `sample` counting from `first`. Raises BadInput."""
    encoded = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    columns = zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        _fit(Row(sample, tuple(ids), _labels(row, ids, offsets)), spec, row.where, sequence_len)
        for sample, (row, ids, offsets) in enumerate(columns, first)
    ]


def _labels(row: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """`ids` within the spans, -100 elsewhere. Raises BadInput if a token reaches over the start of a span."""
    labels = [IGNORE] * len(ids)
    token = 0
    for span in row.spans:
        while token < len(ids) and offsets[token][1] <= span.start:
            token += 1
        if token < len(ids) and offsets[token][0] < span.start:
            raise BadInput(JOINED.format(where=row.where))
        while token < len(ids) and offsets[token][1] <= span.stop:
            labels[token] = ids[token]
            token += 1
    return tuple(labels)


def _fit(row: Row, spec: DatasetSpec, where: str, sequence_len: int) -> Row:
    length = len(row.input_ids)
    if length > sequence_len and spec.type != "chat":
        raise BadInput(f"{where}: the row has {length} tokens; raise sequence_len, which is {sequence_len}")
    kept = Row(row.sample, row.input_ids[:sequence_len], row.labels[:sequence_len])
    if all(label == IGNORE for label in kept.labels[1:]):  # the first token is never predicted
        raise BadInput(
            f"{where}: none of the assistant's tokens is among the first {sequence_len} of {length}; "
            "raise sequence_len or shorten the row"
        )
    return kept
