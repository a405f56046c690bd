"""Greedy replies in lock-step: every rank runs the same number of decoding steps. No scoring here."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from workers.compose import meeting_length
from workers.head import SAME_KERNEL_ROWS
from workers.reading import Chunk, Reader, read_all

TOKENS_PER_PASS = 4096
"""Padded tokens, replies included, that one batch may hold in its cache."""


@dataclass(frozen=True)
class Asked:
    """What one candidate is to reply to; `slot` is its adapter's, None for the base."""

    slot: int | None
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop_ids: tuple[int, ...]


def greedy_replies(reader: Reader, candidates: Sequence[Asked]) -> list[list[list[int]]]:
    """Each candidate's greedy reply to each of its prompts, without the stop token. Collective."""
    chunks = [
        chunk for number, asked in enumerate(candidates) for chunk in _cut(number, asked, reader.longest)
    ]

    def read(mine: tuple[Chunk, ...]) -> dict[tuple[int, int], list[int]]:
        asked = candidates[mine[0].candidate]
        keys = [(chunk.candidate, item) for chunk in mine for item in chunk.items]
        prompts = [candidates[number].prompts[item] for number, item in keys]
        if _filled(mine[0]):
            prompts += [prompts[0]] * (SAME_KERNEL_ROWS - len(prompts))
        config = _greedy(asked.max_new_tokens, asked.stop_ids, reader.pad_id)
        replies = _generate(reader, prompts, mine[0].kind[0], config)
        return {key: _until(reply, asked.stop_ids) for key, reply in zip(keys, replies, strict=False)}

    found = read_all(reader, chunks, read)
    return [
        [found[number, item] for item in range(len(asked.prompts))] for number, asked in enumerate(candidates)
    ]


def _greedy(max_new_tokens: int, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """Every choice is named: what is left open would be taken from the base's own generation_config."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
    )


def _cut(number: int, asked: Asked, longest: int) -> Generator[Chunk]:
    """Prompts of similar length together, the longest first."""
    prompts = asked.prompts
    batch: list[int] = []
    for item in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batch and (len(batch) + 1) * (len(prompts[batch[0]]) + asked.max_new_tokens) > TOKENS_PER_PASS:
            yield _chunk(number, asked, batch, longest)
            batch = []
        batch.append(item)
    if batch:
        yield _chunk(number, asked, batch, longest)


def _chunk(number: int, asked: Asked, items: Sequence[int], longest: int) -> Chunk:
    """A step of decoding is a product with a row a reply, and fewer rows than 16 may take another kernel,
    with other last bits. So a pass of fewer is filled up; one in which 16 have no room is this chunk's alone.
    """
    length = meeting_length(len(asked.prompts[items[0]]), len(items), longest)
    whole = length + asked.max_new_tokens
    owner = None if SAME_KERNEL_ROWS * whole <= TOKENS_PER_PASS else number
    padded = any(len(asked.prompts[item]) < length for item in items)
    kind = (length, asked.max_new_tokens, asked.stop_ids, padded, owner)
    return Chunk(number, asked.slot, tuple(items), kind, len(items) * whole / TOKENS_PER_PASS)


def _filled(chunk: Chunk) -> bool:
    return chunk.kind[-1] is None


def _generate(
    reader: Reader, prompts: Sequence[Sequence[int]], length: int, config: GenerationConfig
) -> list[list[int]]:
    """Prompts are padded on the left, as generation needs: a reply continues the last column."""
    gaps = [length - len(prompt) for prompt in prompts]
    pad_id = int(config.pad_token_id)
    ids = torch.tensor(
        [[pad_id] * gap + list(p) for gap, p in zip(gaps, prompts, strict=True)], device=reader.device
    )
    mask = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps], device=reader.device)
    with torch.no_grad():
        # synced_gpus keeps a rank stepping until the last one has finished, also on CPUs.
        out = reader.model.generate(
            ids, attention_mask=mask, generation_config=config, synced_gpus=reader.ranks.world_size > 1
        )
    return out[:, length:].tolist()


def _until(reply: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = (i for i, token in enumerate(reply) if token in stop_ids)
    return reply[: next(ends, len(reply))]
