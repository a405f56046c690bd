"""Conversations up to their last assistant message: what a model is asked to reply to, and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.data import Rendered, control_tokens, render_all
from workers.rows import messages, read_rows
from workers.types import BadInput, EvaluationSpec


@dataclass(frozen=True)
class Dialogue:
    """One reply to be made. `prompt` is `text` in tokens, without its beginning if it is too long."""

    words: str
    """The conversation as people read it."""
    prompt: tuple[int, ...]
    reference: str
    stop_ids: tuple[int, ...]
    """Tokens that end a reply: the template's and the tokenizer's own."""


def read_dialogues(tokenizer: Any, spec: EvaluationSpec) -> list[Dialogue]:
    """The first `generate_samples` rows. Raises BadInput, also if a reply leaves no room for a prompt."""
    room = spec.sequence_len - spec.max_new_tokens
    if spec.generate_samples > 0 and room < 1:
        raise BadInput(
            f"evaluation.max_new_tokens: {spec.max_new_tokens} leaves no room for a prompt in sequence_len, "
            f"which is {spec.sequence_len}; lower it"
        )
    found: list[Dialogue] = []
    for dataset in spec.datasets:
        rows = read_rows(dataset)[: max(0, spec.generate_samples - len(found))]
        for row, page in zip(rows, render_all(tokenizer, dataset, rows), strict=True):
            found.append(_dialogue(tokenizer, messages(dataset, row), page, room))
    return found


def _dialogue(tokenizer: Any, turns: list[dict[str, str]], page: Rendered, room: int) -> Dialogue:
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    words = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:last])
    prompt = tokenizer(page.text[: page.spans[-1].start], add_special_tokens=False)["input_ids"]
    return Dialogue(words, tuple(prompt[-room:]), turns[last]["content"], _stop_ids(tokenizer, page))


def _stop_ids(tokenizer: Any, page: Rendered) -> tuple[int, ...]:
    end = page.text[page.spans[-1].tail : page.spans[-1].stop].strip()
    found = {tokenizer.convert_tokens_to_ids(end)} if end in control_tokens(tokenizer) else set()
    return tuple(sorted(found | ({tokenizer.eos_token_id} - {None})))
