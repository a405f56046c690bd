"""Score candidates on their tasks: likelihoods and replies in, an `EvaluationReport` each out.

Candidates that are scored together are read in shared passes, and each gets the report that it gets alone.
Reports are the same on every rank and for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.dialogues import Dialogue
from workers.generate import Asked, greedy_replies
from workers.questions import Questions, read_questions
from workers.ranks import Ranks
from workers.reading import Reader
from workers.score import Likelihood, can_share, likelihoods
from workers.types import BadInput, EvaluationReport, EvaluationSpec


@dataclass(frozen=True)
class Candidate:
    """The adapter in `slot`, or None for the base alone, and how it is scored."""

    slot: int | None
    evaluation: EvaluationSpec


def evaluate(
    model: Any, tokenizer: Any, ranks: Ranks, spec: EvaluationSpec, device: torch.device
) -> EvaluationReport:
    """Score `model`, a causal LM whose head is wrapped by `workers.head.install`. Collective.

    The caller has set the adapter for every row. Raises BadInput, on every rank alike, for rows that cannot
    be used or scores that are not finite.
    """
    reader = Reader(model, ranks, device, int(tokenizer.pad_token_id or 0))
    (report,) = evaluate_together(reader, tokenizer, [Candidate(None, spec)])
    if isinstance(report, BadInput):
        raise report
    return report


def evaluate_together(
    reader: Reader, tokenizer: Any, candidates: Sequence[Candidate]
) -> list[EvaluationReport | BadInput]:
    """Each candidate's report, or why it has none, which keeps no other from its own.

    Collective; the same on every rank.
    """
    training = reader.model.training
    reader.model.eval()
    try:
        return _evaluate(reader, tokenizer, candidates)
    finally:
        reader.model.train(training)


def _evaluate(
    reader: Reader, tokenizer: Any, candidates: Sequence[Candidate]
) -> list[EvaluationReport | BadInput]:
    specs = dict.fromkeys(candidate.evaluation for candidate in candidates)
    read = {spec: _agreed(reader, tokenizer, spec) for spec in specs}
    questions = [read[candidate.evaluation] for candidate in candidates]
    slots = [candidate.slot for candidate in candidates]
    passages = [asked.passages if isinstance(asked, Questions) else () for asked in questions]
    scores = likelihoods(reader, list(zip(slots, passages, strict=True)))
    questions = [_unless_diverged(*pair) for pair in zip(questions, scores, strict=True)]
    prompts = [
        _asked(candidate, asked.dialogues if isinstance(asked, Questions) else ())
        for candidate, asked in zip(candidates, questions, strict=True)
    ]
    replies = [_as_text(tokenizer, found) for found in greedy_replies(reader, prompts)]
    return [
        asked.report(own, said) if isinstance(asked, Questions) else asked
        for asked, own, said in zip(questions, scores, replies, strict=True)
    ]


def _agreed(reader: Reader, tokenizer: Any, spec: EvaluationSpec) -> Questions | BadInput:
    """The questions, once every rank has them; what keeps one rank from them keeps all."""
    questions, problem = None, ""
    try:
        questions = read_questions(tokenizer, spec, can_share(reader.model))
    except (BadInput, OSError) as error:
        problem = str(error)
    for found in reader.ranks.gather(problem):
        if found:
            return BadInput(found)
    assert questions is not None
    return questions


def _unless_diverged(asked: Questions | BadInput, scores: Sequence[Likelihood]) -> Questions | BadInput:
    if all(math.isfinite(score.log_likelihood) for score in scores):
        return asked
    return BadInput("the scores are not finite numbers: the adapter has diverged; train it again more gently")


def _asked(candidate: Candidate, dialogues: Sequence[Dialogue]) -> Asked:
    stop_ids = {token for dialogue in dialogues for token in dialogue.stop_ids}
    return Asked(
        candidate.slot,
        [dialogue.prompt for dialogue in dialogues],
        candidate.evaluation.max_new_tokens,
        tuple(sorted(stop_ids)),
    )


def _as_text(tokenizer: Any, replies: Sequence[Sequence[int]]) -> list[str]:
    if not replies:
        return []  # of which the tokenizer would make one empty text
    return [text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True)]
