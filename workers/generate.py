"""Greedy replies in lock-step: every rank runs the same number of decoding steps. No scoring here."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from workers.ranks import Ranks

TOKENS_PER_PASS = 4096
"""Padded tokens, replies included, that one batch may hold in its cache."""


def greedy_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    ranks: Ranks,
    device: torch.device,
) -> list[list[int]]:
    """The greedy reply to each prompt, without its stop token. Collective; the same on every rank."""
    config = _greedy(max_new_tokens, stop_ids, pad_id)
    batches = list(_cut(prompts, max_new_tokens))
    found: dict[int, list[int]] = {}
    for number in range(0, len(batches), ranks.world_size):
        # As in scoring: a rank without a batch of its own repeats the last one.
        mine = batches[min(number + ranks.rank, len(batches) - 1)]
        replies = _generate(model, [prompts[i] for i in mine], config, ranks.world_size > 1, device)
        found |= {i: _until(reply, stop_ids) for i, reply in zip(mine, replies, strict=True)}
    merged: dict[int, list[int]] = {}
    for part in ranks.gather(found):
        merged |= part
    return [merged[i] for i in range(len(prompts))]


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


def _cut(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Generator[list[int]]:
    """Indices of prompts of similar length together, the longest first."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batch and (len(batch) + 1) * (len(prompts[batch[0]]) + max_new_tokens) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    in_step: bool,
    device: torch.device,
) -> list[list[int]]:
    """Prompts are padded on the left, as generation needs: a reply continues the last column."""
    length = max(len(prompt) for prompt in prompts)
    gaps = [length - len(prompt) for prompt in prompts]
    pad_id = int(config.pad_token_id)
    ids = torch.tensor(
        [[pad_id] * gap + list(p) for gap, p in zip(gaps, prompts, strict=True)], device=device
    )
    mask = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps], device=device)
    with torch.no_grad():
        # synced_gpus keeps a rank stepping until the last one has finished, also on CPUs.
        out = model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=in_step)
    return out[:, length:].tolist()


def _until(reply: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = (i for i, token in enumerate(reply) if token in stop_ids)
    return reply[: next(ends, len(reply))]
