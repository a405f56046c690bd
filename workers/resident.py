"""One job on a host: its rows, its place in them, its optimizer, and what its current step still needs."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from workers import checkpoint
from workers.base import Base
from workers.capacity import chunk_tokens
from workers.compose import Chunk, cut_step
from workers.data import encode_all
from workers.manifest import CorruptFolder
from workers.optim import JobOptimizer
from workers.order import batch_samples, num_steps, steps_per_epoch
from workers.ranks import Ranks
from workers.rows import Row
from workers.step import Share, target_count
from workers.types import Attached, BadInput, JobSpec, StepDone, Validated

log = logging.getLogger(__name__)
TOLD_AGAIN = 1000
"""Reports a checkpoint carries. Several checkpoints may be written while the listener is busy elsewhere, so
those since the last one are not enough; it may miss this many before it is killed."""


@dataclass
class Resident:
    """State is the same on every rank, except gradients that wait for the reduction at the step's end."""

    spec: JobSpec
    slot: int
    rows: list[Row]
    validation: list[Row]
    num_steps: int
    optimizer: JobOptimizer
    step: int = 0
    """Steps done."""
    bad_steps: int = 0
    chunk_tokens: int = 4096
    """The base file's, until a chunk did not fit in memory."""
    chunks: list[Chunk] = field(default_factory=list)
    """What the current step still needs."""
    target_tokens: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    loss: Tensor | float = 0.0
    """This rank's part of the current step's loss so far, on the device."""
    started: float = 0.0
    reports: deque[StepDone | Validated] = field(default_factory=lambda: deque(maxlen=TOLD_AGAIN))
    """The latest, in order, those of former attempts included."""

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def adapter_parameters(self) -> int:
        return self.optimizer.slot.weights.numel()

    @property
    def share(self) -> Share:
        training = self.spec.training
        return Share(self.slot, training.seed, self.step, self.spec.adapter.lora_dropout, self.target_tokens)

    def begin_step(self, base: Base, ranks: Ranks) -> None:
        """Draw the step's batch and cut it into chunks."""
        training = self.spec.training
        samples = batch_samples(training.seed, self.step, len(self.rows), training.global_batch_size)
        batch = [self.rows[sample] for sample in samples]
        self.chunks = cut_step(batch, ranks.world_size, self.chunk_tokens, base.longest)
        self.target_tokens = target_count(batch)
        self.tokens = sum(len(row.input_ids) for row in batch)
        self.padded_tokens = sum(chunk.padded_tokens for chunk in self.chunks)
        self.loss = 0.0
        self.started = self.started or time.monotonic()

    def begin_step_again(self, base: Base, ranks: Ranks) -> None:
        """Drop what the current step has summed up so far, and begin it anew."""
        gradient = self.optimizer.slot.weights.grad
        assert gradient is not None, "a slot always has its gradient"
        gradient.zero_()
        self.begin_step(base, ranks)

    def loss_on(self, device: torch.device) -> Tensor:
        """`loss` as a float64 scalar, also where no row of the step came to this rank."""
        return torch.as_tensor(self.loss, dtype=torch.float64, device=device)

    def end_step(self, loss: float, grad_norm: float) -> StepDone:
        """Count the step that the optimizer has just taken, or left out, and report it."""
        finite, rate = math.isfinite(grad_norm), self.optimizer.learning_rate
        self.step += 1
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.optimizer.set_step(self.step)
        seconds, self.started = time.monotonic() - self.started, time.monotonic()
        job, attempt = self.spec.job, self.spec.attempt
        report = StepDone(
            job,
            attempt,
            self.step,
            loss,
            grad_norm,
            rate,
            self.tokens,
            seconds,
            skipped=not finite,
            padded_tokens=self.padded_tokens,
        )
        self.reports.append(report)
        return report

    def progress(self) -> checkpoint.Progress:
        steps = tuple(asdict(told) for told in self.reports if isinstance(told, StepDone))
        validations = tuple(asdict(told) for told in self.reports if isinstance(told, Validated))
        return checkpoint.Progress(self.step, self.bad_steps, steps, validations)

    # -- events ----------------------------------------------------------------------------------------

    def attached(self) -> Attached:
        spec, trainable = self.spec, self.adapter_parameters
        return Attached(spec.job, spec.attempt, self.step, self.num_steps, len(self.rows), trainable)

    def validated(self, loss: float) -> Validated:
        report = Validated(self.spec.job, self.spec.attempt, self.step, loss)
        self.reports.append(report)
        return report

    def due(self, per_epoch: int) -> bool:
        """Whether something done `per_epoch` times an epoch, and at the very end, is due after this step."""
        if self.finished:
            return True
        every = max(
            1, steps_per_epoch(len(self.rows), self.spec.training.global_batch_size) // max(1, per_epoch)
        )
        return per_epoch > 0 and self.step % every == 0


def settle(base: Base, spec: JobSpec, slot: int, resume_from: Path | None) -> Resident:
    """Read the job's data, fill its slot, and go on from a checkpoint if there is one. No collectives.

    Raises BadInput for data or hyper-parameters that cannot be used, CorruptFolder for a torn checkpoint.
    """
    try:
        return _settle(base, spec, slot, resume_from)
    except (BadInput, CorruptFolder, OSError):
        raise
    except Exception as error:  # whatever one job brings along, the others stay resident
        log.exception("%s cannot be made resident", spec.job)
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"the job cannot start ({words}); correct its recipe or its data") from error


def _settle(base: Base, spec: JobSpec, slot: int, resume_from: Path | None) -> Resident:
    training = spec.training
    if training.sequence_len > base.longest:
        raise BadInput(
            f"sequence_len: {training.sequence_len} is longer than the base allows ({base.longest} tokens)"
        )
    rows = encode_all(base.tokenizer, spec.train, training.sequence_len)
    validation = encode_all(base.tokenizer, spec.validation, training.sequence_len) if spec.validation else []
    optimized = base.slots.create(slot, spec.adapter, training.seed)
    steps = num_steps(training, len(rows))
    resident = Resident(spec, slot, rows, validation, steps, JobOptimizer(optimized, training, steps))
    resident.chunk_tokens = chunk_tokens(base.spec)
    if resume_from is not None:
        saved = checkpoint.load(resume_from)
        base.slots.overwrite(slot, saved.adapter)
        resident.optimizer.restore(saved.optimizer, saved.progress.step)
        resident.step, resident.bad_steps = saved.progress.step, saved.progress.bad_steps
        told: list[StepDone | Validated] = [StepDone(**report) for report in saved.progress.reports]
        told += [Validated(**report) for report in saved.progress.validations]
        told.sort(key=lambda report: report.step)
        resident.reports.extend(replace(report, attempt=spec.attempt) for report in told)
    return resident
