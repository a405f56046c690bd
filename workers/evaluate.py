"""Score candidates on their tasks: likelihoods and replies in, an `EvaluationReport` each out.

Candidates that are scored together are read in shared passes, and each gets the report that it gets alone.
Reports are the same on every rank and for any number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from workers.dialogues import Dialogue
from workers.generate import Asked, greedy_replies
from workers.questions import Questions, read_questions
from workers.ranks import Ranks
from workers.reading import Reader
from workers.score import Likelihood, can_share, likelihoods
from workers.types import BadInput, EvaluationReport, EvaluationSpec

log = logging.getLogger(__name__)
T = TypeVar("T")


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
    share = can_share(reader.model)
    found = [_made(lambda: read_questions(tokenizer, spec, share)) for spec in specs]  # noqa: B023
    read = dict(zip(specs, _agreed(reader.ranks, found), strict=True))
    questions = [read[candidate.evaluation] for candidate in candidates]
    slots = [candidate.slot for candidate in candidates]
    passages = [asked.passages if isinstance(asked, Questions) else () for asked in questions]
    scores = likelihoods(reader, list(zip(slots, passages, strict=True)))
    questions = [_unless_diverged(*pair) for pair in zip(questions, scores, strict=True)]
    prompts = [
        _asked(candidate, asked.dialogues if isinstance(asked, Questions) else ())
        for candidate, asked in zip(candidates, questions, strict=True)
    ]
    replies = greedy_replies(reader, prompts)
    if reader.ranks.rank != 0:  # one rank is enough to import the metrics' libraries and to wait for them
        return reader.ranks.broadcast(None)
    reports = [
        _made(lambda: asked.report(own, _as_text(tokenizer, said)))  # noqa: B023
        if isinstance(asked, Questions)
        else asked
        for asked, own, said in zip(questions, scores, replies, strict=True)
    ]
    return reader.ranks.broadcast(reports)


def _made(make: Callable[[], T]) -> T | BadInput:
    """What `make` makes, without collectives. Whatever one candidate brings along, the others are scored."""
    try:
        return make()
    except (BadInput, OSError) as error:
        return BadInput(str(error) or type(error).__name__)
    except Exception as error:
        log.exception("a candidate cannot be scored")
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return BadInput(f"it cannot be scored ({words}); correct the data of its task")


def _agreed(ranks: Ranks, made: Sequence[T | BadInput]) -> list[T | BadInput]:
    """Each thing, if every rank has made it; what keeps one rank from it keeps all."""
    own = [str(one) if isinstance(one, BadInput) else "" for one in made]
    problems = [next(filter(None, each), "") for each in zip(*ranks.gather(own), strict=True)]
    return [BadInput(problem) if problem else one for one, problem in zip(made, problems, strict=True)]


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
