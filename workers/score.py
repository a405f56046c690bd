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
from workers.compose import meeting_length
from workers.data import IGNORE
from workers.head import target_logits
from workers.reading import Chunk, Reader, read_all
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
    reader: Reader, candidates: Sequence[tuple[int | None, Sequence[Passage]]]
) -> list[list[Likelihood]]:
    """Every score of each candidate, in order, the same on every rank. Collective.

    A candidate is the slot of its adapter (None: the base) and its passages.
    """
    vocabulary = reader.model.config.get_text_config().vocab_size
    chunks = [
        chunk
        for candidate, (slot, passages) in enumerate(candidates)
        for chunk in _cut(candidate, slot, passages, vocabulary, reader.longest)
    ]

    def read(mine: tuple[Chunk, ...]) -> dict[tuple[int, int], Likelihood]:
        passages = [candidates[chunk.candidate][1][item] for chunk in mine for item in chunk.items]
        owners = [chunk.candidate for chunk in mine for _ in chunk.items]
        return _forward(reader, mine[0].kind[0], passages, owners)

    found = read_all(reader, chunks, read)
    scores: list[list[Likelihood]] = [[] for _ in candidates]
    for candidate, score in sorted(found):
        scores[candidate].append(found[candidate, score])
    return scores


def _cut(
    candidate: int, slot: int | None, passages: Sequence[Passage], vocabulary: int, longest: int
) -> Generator[Chunk]:
    """Passages of similar length together, the longest first; a chunk is at most a pass."""
    chunk: list[int] = []
    targets = 0

    def cut() -> Chunk:
        length = meeting_length(len(passages[chunk[0]].input_ids), len(chunk), longest)
        forked = any(passages[item].forked for item in chunk)
        share = max(len(chunk) * length / TOKENS_PER_PASS, targets * vocabulary / LOGITS_PER_PASS)
        return Chunk(candidate, slot, tuple(chunk), (length, forked), share)

    for item in sorted(range(len(passages)), key=lambda item: -len(passages[item].input_ids)):
        more = targets + len(passages[item].at)
        padded = (len(chunk) + 1) * len(passages[chunk[0] if chunk else item].input_ids)
        if chunk and (padded > TOKENS_PER_PASS or more * vocabulary > LOGITS_PER_PASS):
            yield cut()
            chunk, more = [], len(passages[item].at)
        chunk.append(item)
        targets = more
    if chunk:
        yield cut()


@torch.no_grad()
def _forward(
    reader: Reader, length: int, passages: Sequence[Passage], owners: Sequence[int]
) -> dict[tuple[int, int], Likelihood]:
    """(candidate, score) -> what was found; passage k is candidate `owners[k]`'s."""
    model, device = reader.model, reader.device
    inputs: dict[str, Tensor] = {"input_ids": _padded([p.input_ids for p in passages], length, reader.pad_id)}
    if any(passage.forked for passage in passages):
        inputs["position_ids"] = _padded([p.position_ids for p in passages], length, 0)
        branches_RT = _padded([p.branches for p in passages], length, -1)
        inputs["attention_mask"] = _fork_mask(branches_RT, model.dtype)
    at_P = torch.tensor([row * length + i for row, p in enumerate(passages) for i in p.at], device=device)
    targets_P = torch.tensor([target for p in passages for target in p.targets], device=device)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # All answers of a prompt begin at its end: the head runs once for a position, whatever follows it.
    at_U, back_P = at_P.unique(return_inverse=True)
    if len(at_U) == 1:
        at_U = at_U.repeat(
            2
        )  # the sum over a lone row's words is taken in another order than over one of many
    logits_UV = target_logits(model, at_U, use_cache=False, **inputs)
    keys = [(owner, score) for owner, p in zip(owners, passages, strict=True) for score in p.scores]
    return _sums(keys, logits_UV, back_P, targets_P)


def _sums(
    scores: Sequence[tuple[int, int]], logits_UV: Tensor, back_P: Tensor, targets_P: Tensor
) -> dict[tuple[int, int], Likelihood]:
    """Per score, the sum of log softmax(logits)[target]; target p is predicted by row `back_P[p]`."""
    logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32))
    chosen_P = logits_UV[back_P, targets_P] - logits_UV.logsumexp(1)[back_P]
    correct_P = logits_UV.argmax(1)[back_P] == targets_P
    sums: dict[tuple[int, int], Likelihood] = {}
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
