"""Log-likelihoods of chosen tokens, in forward passes that all ranks run equally often.

Answers to one prompt share it: they stand behind it in one row, each at the positions it would have alone,
and the attention mask keeps them from seeing one another. That is one pass over the prompt, however many
answers it has, and one gather of a partitioned base.

Shapes: R rows of T tokens; P targets, predicted at U distinct positions; V words.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.choices import Choice
from workers.data import IGNORE
from workers.head import target_logits
from workers.ranks import Ranks
from workers.rows import Row

TOKENS_PER_PASS = 4096
"""Padded tokens of one forward pass."""
LOGITS_PER_PASS = 1 << 27
"""Entries of [U, V] held at once: 512 MiB in float32."""


@dataclass(frozen=True)
class Likelihood:
    """One score: the summed log-likelihood (natural) of its target tokens, and how many were the argmax."""

    log_likelihood: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class Passage:
    """One row of a forward pass. Branch 0 is the trunk; another branch is seen by itself alone.

    Target k is token `targets[k]`, predicted at index `at[k]`, and counts for score `scores[k]`.
    """

    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    branches: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[int, ...]
    scores: tuple[int, ...]

    @property
    def forked(self) -> bool:
        return any(self.branches)


def row_passage(row: Row, score: int) -> Passage:
    """A whole row; its labels are the targets of one score."""
    at = [i - 1 for i, label in enumerate(row.labels) if label != IGNORE and i > 0]
    length = len(row.input_ids)
    return Passage(
        row.input_ids,
        tuple(range(length)),
        (0,) * length,
        tuple(at),
        tuple(row.labels[i + 1] for i in at),
        (score,) * len(at),
    )


def choice_passages(choice: Choice, first_score: int, share: bool) -> list[Passage]:
    """A prompt with as many of its answers behind it as fit a pass; answer k is score `first_score + k`.

    Without `share` every answer has a row of its own, and no branch.
    """
    parts: list[list[int]] = [[]]
    length = len(choice.prompt)
    for index, answer in enumerate(choice.answers):
        if parts[-1] and (not share or length + len(answer) > TOKENS_PER_PASS):
            parts.append([])
            length = len(choice.prompt)
        parts[-1].append(index)
        length += len(answer)
    return [_fork(choice, part, first_score) for part in parts]


def _fork(choice: Choice, part: Sequence[int], first_score: int) -> Passage:
    prompt = choice.prompt
    ids, positions, branches = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    at, targets, scores = [], [], []
    for branch, index in enumerate(part, 1):
        answer, start = choice.answers[index], len(ids)
        # The first token is predicted at the prompt's end; the last one is predicted and never read.
        at += [len(prompt) - 1, *range(start, start + len(answer) - 1)]
        targets += answer
        scores += [first_score + index] * len(answer)
        ids += answer[:-1]
        positions += range(len(prompt), len(prompt) + len(answer) - 1)
        branches += [branch if len(part) > 1 else 0] * (len(answer) - 1)
    return Passage(tuple(ids), tuple(positions), tuple(branches), tuple(at), tuple(targets), tuple(scores))


def can_share(model: Any) -> bool:
    """Whether every layer attends to all that the mask allows; a sliding window would need a mask its own."""
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def likelihoods(
    model: Any, passages: Sequence[Passage], ranks: Ranks, device: torch.device, pad_id: int
) -> list[Likelihood]:
    """Every score, in order, the same on every rank. Collective.

    The passes are cut from the passages alone, so a score does not depend on the number of ranks.
    """
    vocabulary = model.config.get_text_config().vocab_size
    passes = list(_cut(passages, vocabulary))
    found: dict[int, Likelihood] = {}
    for number in range(0, len(passes), ranks.world_size):
        # A rank without a pass of its own repeats the last one: a partitioned base needs every rank.
        mine = passes[min(number + ranks.rank, len(passes) - 1)]
        found |= _forward(model, mine, device, pad_id)
    merged: dict[int, Likelihood] = {}
    for part in ranks.gather(found):
        merged |= part
    return [merged[score] for score in sorted(merged)]


def _cut(passages: Sequence[Passage], vocabulary: int) -> Generator[list[Passage]]:
    """Passages of similar length together, the longest first."""
    batch: list[Passage] = []
    targets = 0
    for passage in sorted(passages, key=lambda passage: -len(passage.input_ids)):
        targets += len(passage.at)
        padded = (len(batch) + 1) * len((batch or [passage])[0].input_ids)
        if batch and (padded > TOKENS_PER_PASS or targets * vocabulary > LOGITS_PER_PASS):
            yield batch
            batch, targets = [], len(passage.at)
        batch.append(passage)
    if batch:
        yield batch


@torch.no_grad()
def _forward(
    model: Any, batch: Sequence[Passage], device: torch.device, pad_id: int
) -> dict[int, Likelihood]:
    length = len(batch[0].input_ids)
    inputs: dict[str, Tensor] = {"input_ids": _padded([p.input_ids for p in batch], length, pad_id)}
    if any(passage.forked for passage in batch):
        inputs["position_ids"] = _padded([p.position_ids for p in batch], length, 0)
        branches_RT = _padded([p.branches for p in batch], length, -1)
        inputs["attention_mask"] = _fork_mask(branches_RT, model.dtype)
    at_P = torch.tensor([row * length + i for row, p in enumerate(batch) for i in p.at], device=device)
    targets_P = torch.tensor([target for p in batch for target in p.targets], device=device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # All answers of a prompt begin at its end: the head runs once for a position, whatever follows it.
    at_U, back_P = at_P.unique(return_inverse=True)
    logits_UV = target_logits(model, at_U, use_cache=False, **inputs)
    return _sums([score for p in batch for score in p.scores], logits_UV, back_P, targets_P)


def _sums(
    scores: Sequence[int], logits_UV: Tensor, back_P: Tensor, targets_P: Tensor
) -> dict[int, Likelihood]:
    """Per score, the sum of log softmax(logits)[target]; target p is predicted by row `back_P[p]`."""
    logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32))
    chosen_P = logits_UV[back_P, targets_P] - logits_UV.logsumexp(1)[back_P]
    correct_P = logits_UV.argmax(1)[back_P] == targets_P
    sums: dict[int, Likelihood] = {}
    for score, chosen, correct in zip(scores, chosen_P.tolist(), correct_P.tolist(), strict=True):
        so_far = sums.get(score, Likelihood(0.0, 0, 0))
        sums[score] = Likelihood(
            so_far.log_likelihood + chosen, so_far.tokens + 1, so_far.correct + int(correct)
        )
    return sums


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """Right-padded [R, T]: what follows a token changes nothing under causal attention."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _fork_mask(branches_RT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [R, 1, T, T]: a token sees itself, its own branch before it, and the trunk before it."""
    length = branches_RT.shape[1]
    earlier_TT = torch.ones(length, length, dtype=torch.bool).tril()
    seen_R1T, own_RTT = branches_RT[:, None, :] == 0, branches_RT[:, :, None] == branches_RT[:, None, :]
    visible_RTT = earlier_TT & (seen_R1T | own_RTT)
    mask_RTT = torch.zeros(visible_RTT.shape, dtype=dtype).masked_fill(~visible_RTT, torch.finfo(dtype).min)
    return mask_RTT[:, None]
