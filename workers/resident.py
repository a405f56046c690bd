"""One job on a host: its rows, its place in them, its optimizer, and what its current step still needs."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from workers import checkpoint
from workers.adapter import read_adapter
from workers.base import Base
from workers.capacity import chunk_tokens
from workers.compose import Chunk, Lesson, cut_step, cut_step_end_to_end
from workers.encoded import Encoded, cannot_start, encode, sources
from workers.head import returns_logits_as_they_are
from workers.manifest import CorruptFolder, verify_folder
from workers.memory import is_out_of_memory
from workers.optim import JobOptimizer
from workers.order import batch_samples, num_steps, steps_per_epoch
from workers.ranks import Ranks
from workers.rows import Row
from workers.step import Share, target_count
from workers.types import Attached, BadInput, JobSpec, StepDone, Validated

log = logging.getLogger(__name__)
FROZEN = 10 / 18
"""What a teacher's parameter holds of a trained one's memory: no moments, so 10 bytes of 18, or 8 of 16."""
TOLD_AGAIN = 1000
"""Reports a checkpoint carries. Several checkpoints may be written while the listener is busy elsewhere, so
those since the last one are not enough; it may miss this many before it is killed."""


@dataclass(frozen=True)
class Course:
    """Rows that every step draws from: a plain job has one, a distillation one for each teacher."""

    rows: Sequence[Row]
    validation: Sequence[Row]
    batch_size: int
    lesson: Lesson | None = None
    """How they count; its `target_tokens` are filled in batch by batch."""

    def lesson_of(self, batch: Sequence[Row]) -> Lesson | None:
        return replace(self.lesson, target_tokens=target_count(batch)) if self.lesson else None


@dataclass
class Resident:
    """State is the same on every rank, except gradients that wait for the reduction at the step's end."""

    spec: JobSpec
    slot: int
    courses: tuple[Course, ...]
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
    teachers: tuple[int, ...] = ()
    """Slots of a distillation's teachers."""
    teacher_parameters: int = 0
    """What these hold, in parameters of a trained adapter."""
    reports: deque[StepDone | Validated] = field(default_factory=lambda: deque(maxlen=TOLD_AGAIN))
    """The latest, in order, those of former attempts included."""

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def train_rows(self) -> int:
        return sum(len(course.rows) for course in self.courses)

    @property
    def validates(self) -> bool:
        return any(course.validation for course in self.courses)

    @property
    def validation(self) -> list[Row]:
        return [row for course in self.courses for row in course.validation]

    @property
    def adapter_parameters(self) -> int:
        """In memory: its own, and its teachers' for what they hold."""
        return self.optimizer.slot.weights.numel() + self.teacher_parameters

    @property
    def share(self) -> Share:
        training = self.spec.training
        return Share(self.slot, training.seed, self.step, self.spec.adapter.lora_dropout, self.target_tokens)

    def begin_step(self, base: Base, ranks: Ranks) -> None:
        """Draw the step's batch and cut it into chunks."""
        self.chunks, self.target_tokens, self.tokens = [], 0, 0
        for course in self.courses:
            samples = batch_samples(self.spec.training.seed, self.step, len(course.rows), course.batch_size)
            batch = [course.rows[sample] for sample in samples]
            lesson = course.lesson_of(batch)
            self.chunks += self._cut(batch, base, ranks, lesson)
            self.target_tokens += target_count(batch)
            self.tokens += sum(len(row.input_ids) for row in batch) * (lesson.readings if lesson else 1)
        self.chunks.sort(key=lambda chunk: -chunk.padded_length)  # as a tick packs them
        self.padded_tokens = sum(chunk.padded_tokens for chunk in self.chunks)
        self.loss = 0.0
        self.started = self.started or time.monotonic()

    def _cut(self, batch: Sequence[Row], base: Base, ranks: Ranks, lesson: Lesson | None) -> list[Chunk]:
        if base.spec.attention == "varlen":
            return cut_step_end_to_end(batch, ranks.world_size, self.chunk_tokens, lesson)
        return cut_step(batch, ranks.world_size, self.chunk_tokens, base.longest, lesson)

    def validation_chunks(self, base: Base, ranks: Ranks) -> list[Chunk]:
        """All validation rows, by their labels alone."""
        chunks: list[Chunk] = []
        for course in self.courses:
            lesson = course.lesson_of(course.validation)
            by_labels = replace(lesson, teacher=None, labels=1.0) if lesson else None
            size = chunk_tokens(base.spec)
            chunks += cut_step(course.validation, ranks.world_size, size, base.longest, by_labels)
        return chunks

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
        spec, trainable = self.spec, self.optimizer.slot.weights.numel()
        return Attached(spec.job, spec.attempt, self.step, self.num_steps, self.train_rows, trainable)

    def validated(self, loss: float) -> Validated:
        report = Validated(self.spec.job, self.spec.attempt, self.step, loss)
        self.reports.append(report)
        return report

    def due(self, per_epoch: int, ahead: int = 0) -> bool:
        """Whether something done `per_epoch` times an epoch, and at the very end, is due after this step, or
        after so many more."""
        step = self.step + ahead
        if step >= self.num_steps:
            return True
        epoch = steps_per_epoch(self.train_rows, sum(course.batch_size for course in self.courses))
        every = max(1, epoch // max(1, per_epoch))
        return per_epoch > 0 and step % every == 0


def settle(
    base: Base,
    spec: JobSpec,
    slot: int,
    teachers: tuple[int, ...],
    resume_from: Path | None,
    encoded: list[Encoded] | None = None,
) -> Resident:
    """Read the job's data, fill its slot, and go on from a checkpoint if there is one. No collectives.

    `teachers` are slots, one for each adapter of a distillation that is to be read; `encoded` is the data if
    it has been read already. Raises BadInput for data or hyper-parameters that cannot be used, CorruptFolder
    for a torn checkpoint, and what an allocator raises as it is.
    """
    try:
        return _settle(base, spec, slot, teachers, resume_from, encoded)
    except (BadInput, CorruptFolder, OSError):
        raise
    except Exception as error:  # whatever one job brings along, the others stay resident
        if is_out_of_memory(error):
            raise
        log.exception("%s cannot be made resident", spec.job)
        raise cannot_start(error) from error


def _settle(
    base: Base,
    spec: JobSpec,
    slot: int,
    teachers: tuple[int, ...],
    resume_from: Path | None,
    encoded: list[Encoded] | None,
) -> Resident:
    training = spec.training
    if training.sequence_len > base.longest:
        raise BadInput(
            f"sequence_len: {training.sequence_len} is longer than the base allows ({base.longest} tokens)"
        )
    optimized = base.slots.create(slot, spec.adapter, training.seed)
    encoded = encoded or encode(base.tokenizer, sources(spec), training.sequence_len)
    courses = _courses(base, spec, teachers, encoded)
    steps = num_steps(training, sum(len(course.rows) for course in courses))
    resident = Resident(spec, slot, courses, steps, JobOptimizer(optimized, training, steps))
    resident.chunk_tokens, resident.teachers = chunk_tokens(base.spec), teachers
    frozen = sum(base.slots[teacher].weights.numel() for teacher in teachers)
    resident.teacher_parameters = math.ceil(frozen * FROZEN)
    if spec.distill is not None and spec.distill.start and resume_from is None:
        _start_from(base, slot, Path(spec.distill.start))
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


def _courses(
    base: Base, spec: JobSpec, teachers: tuple[int, ...], encoded: Sequence[Encoded]
) -> tuple[Course, ...]:
    distill = spec.distill
    if distill is None:
        (data,) = encoded
        return (Course(data.train, data.validation, spec.training.global_batch_size),)
    if teachers and not returns_logits_as_they_are(base.model.config):
        raise BadInput("distillation: this base changes the logits of its head, which is not supported yet")
    total = sum(teacher.weight for teacher in distill.teachers)
    courses: list[Course] = []
    for teacher, data, slot in zip_longest(distill.teachers, encoded, teachers):
        lesson = Lesson(0, teacher.weight / total, slot, distill.labels, distill.temperature)
        courses.append(Course(data.train, data.validation, teacher.batch_size, lesson))
        if slot is not None:
            verify_folder(Path(teacher.adapter_dir))
            base.slots.load(slot, read_adapter(Path(teacher.adapter_dir)))
    return tuple(courses)


def _start_from(base: Base, slot: int, folder: Path) -> None:
    """Give the student the delta of a saved adapter; ranks it has beyond that begin as a fresh one's.

    Both scalings are folded into A and B alike. Raises BadInput if the adapter does not fit into the slot.
    """
    verify_folder(folder)
    adapter, values = read_adapter(folder), base.slots[slot].values()
    for name, (a, b) in adapter.factors.items():
        if name not in values or len(a) > len(values[name][0]):
            raise BadInput(
                f"{folder}: module '{name}' of rank {len(a)} does not fit into the adapter that is to start "
                "from it; give that at least this rank and the same target modules"
            )
        fold = math.sqrt(adapter.scaling(name) / base.slots[slot].factors[name].scaling)
        values[name][0][: len(a)] = a * fold
        values[name][1][:, : len(a)] = b * fold
    base.slots[slot].refresh()
