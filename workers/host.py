"""A host: one frozen base, the jobs resident on it, and the tick that trains them all.

Every method is collective: all ranks of a host make the same calls in the same order, hold the same state,
and return the same events. No Ray here; see `workers.serve` for the loop around it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch

from workers import checkpoint
from workers.adapter import Adapter, read_adapter
from workers.base import Base, load_base
from workers.compose import MicroBatch, compose, cut_step
from workers.evaluate import evaluate
from workers.lora import Segment
from workers.manifest import CorruptFolder, verify_folder
from workers.ranks import Ranks
from workers.resident import Resident, settle
from workers.step import Share, forward_backward, forward_only, reduce_gradients, target_count
from workers.types import (
    Attach,
    BadInput,
    BaseSpec,
    CheckpointSaved,
    Close,
    Command,
    Detach,
    Detached,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    EvaluationReport,
    Event,
    HostReady,
    JobSpec,
    JobStopped,
    StopCode,
    TrainingFinished,
)

ALL_ROWS = 1 << 40
T = TypeVar("T")


class Host:
    def __init__(self, base: Base, ranks: Ranks, load_seconds: float) -> None:
        self.base = base
        self.ranks = ranks
        self.residents: dict[str, Resident] = {}
        self.ready = HostReady(
            ranks.world_size, base.zero, base.spec.slots, base.parameters, round(load_seconds, 3)
        )
        self._credit: dict[str, int] = {}
        self._slots = count()

    @classmethod
    def load(cls, base: BaseSpec, ranks: Ranks) -> Host:
        """Raises BadInput if the base cannot be used."""
        started = time.monotonic()
        return cls(load_base(base, ranks), ranks, time.monotonic() - started)

    @property
    def busy(self) -> bool:
        return bool(self.residents)

    def close(self) -> None:
        self.residents.clear()
        self.ranks.close()

    # -- the tick --------------------------------------------------------------------------------------

    def tick(self) -> list[Event]:
        """One composition over the residents, then a step for every job whose batch is complete."""
        waiting = {job: resident.chunks for job, resident in self.residents.items()}
        composition = compose(waiting, self._credit, self.base.spec.tokens_per_tick)
        self._credit = dict(composition.credit)
        shares = {job: resident.share for job, resident in self.residents.items()}
        for micro_batch in composition.micro_batches:
            for job, loss in forward_backward(self.base, self.ranks, micro_batch, shares).items():
                self.residents[job].loss += loss
        for job, taken in composition.taken.items():
            del self.residents[job].chunks[:taken]
        return self._end_steps([resident for resident in self.residents.values() if not resident.chunks])

    def _end_steps(self, complete: list[Resident]) -> list[Event]:
        if not complete:
            return []
        reduce_gradients(self.ranks, [resident.optimizer.slot.weights for resident in complete])
        norms = torch.stack([resident.optimizer.step() for resident in complete])
        losses = self.ranks.sum_(torch.stack([r.loss_on(norms.device) for r in complete]))
        events: list[Event] = []
        # The tick's one look at the device: everything before it is queued there.
        figures = torch.stack([losses.double(), norms.double()]).tolist()
        for resident, loss, norm in zip(complete, *figures, strict=True):
            events += self._end_step(resident, loss, norm)
        return events

    def _end_step(self, resident: Resident, loss: float, grad_norm: float) -> list[Event]:
        """What is due after a step: its report, validation, a checkpoint, the end."""
        training = resident.spec.training
        events: list[Event] = [resident.end_step(loss, grad_norm)]
        if resident.bad_steps >= training.max_bad_steps:
            words = f"the gradient was not finite in {resident.bad_steps} steps in a row"
            return [*events, self._stop(resident, "diverged", words)]
        if resident.validation and resident.due(training.evals_per_epoch):
            events.append(resident.validated(self._validate(resident)))
        if resident.due(training.saves_per_epoch):
            events.append(self._save(resident))
        if isinstance(events[-1], JobStopped):
            return events
        return [*events, *self._go_on(resident)]

    def _go_on(self, resident: Resident) -> list[Event]:
        """Begin the next step, or finish: publish the adapter and leave the slot."""
        if not resident.finished:
            resident.begin_step(self.base, self.ranks)
            return []
        spec, path = resident.spec, Path(resident.spec.checkpoint_dir) / "adapter"
        problem = self._written(
            lambda: checkpoint.save_adapter(path, self._export(resident), self.base.spec.digest)
        )
        if problem:
            return [self._stop(resident, *problem)]
        self._leave(resident)
        return [TrainingFinished(spec.job, spec.attempt, resident.step, str(path))]

    def _validate(self, resident: Resident) -> float:
        """Mean loss over the validation rows, without neighbours."""
        spec = self.base.spec
        tokens = target_count(resident.validation)
        share = Share(resident.slot, 0, 0, 0.0, tokens)
        chunks = cut_step(resident.validation, self.ranks.world_size, spec.tokens_per_tick, self.base.longest)
        total = torch.zeros((), dtype=torch.float64, device=self.base.device)
        for chunk in chunks:
            micro_batch = MicroBatch(chunk.padded_length, (("validation", chunk),))
            for loss in forward_only(self.base, self.ranks, micro_batch, {"validation": share}).values():
                total += loss
        return float(self.ranks.sum_(total))

    # -- commands --------------------------------------------------------------------------------------

    def apply(self, command: Command) -> list[Event]:
        """Carry out one command between two ticks."""
        match command:
            case Attach(job):
                return self._attach(job)
            case Detach(job, attempt):
                return self._detach(job, attempt)
            case Evaluate():
                return [self._evaluate(command)]
            case Close():
                self.close()
                return []

    def _attach(self, spec: JobSpec) -> list[Event]:
        if len(self.residents) >= self.base.spec.slots:
            return [JobStopped(spec.job, spec.attempt, 0, "internal_error", "the host has no free slot")]
        found = checkpoint.newest(Path(spec.checkpoint_dir)) if self.ranks.rank == 0 else None
        path, slot = self.ranks.broadcast(found), next(self._slots)
        resident, message = self._together(lambda: settle(self.base, spec, slot, path))
        if resident is None:
            self.base.slots.free(slot)
            return [JobStopped(spec.job, spec.attempt, 0, "bad_data", message)]
        self.residents[spec.job] = resident
        return [resident.attached(), *resident.reports, *self._go_on(resident)]

    def _detach(self, job: str, attempt: int) -> list[Event]:
        resident = self.residents.get(job)
        if resident is None or resident.spec.attempt != attempt:
            return []
        saved: list[Event] = [self._save(resident)] if resident.step else []
        if saved and isinstance(saved[-1], JobStopped):
            return saved
        self._leave(resident)
        return [*saved, Detached(job, attempt, resident.step)]

    def _evaluate(self, command: Evaluate) -> Event:
        started, slot = time.monotonic(), next(self._slots)
        report, message = self._together(lambda: self._score(command, slot))
        self.base.slots.free(slot)
        if report is None:
            return EvaluationFailed(command.request, message)
        return EvaluationDone(command.request, report, time.monotonic() - started)

    def _score(self, command: Evaluate, slot: int) -> EvaluationReport:
        base, segments = self.base, []
        if command.adapter_dir is not None:
            verify_folder(Path(command.adapter_dir))
            base.slots.load(slot, read_adapter(Path(command.adapter_dir)))
            segments = [Segment(slot, 0, ALL_ROWS)]
        with base.adapters.rows(segments), torch.no_grad():
            return evaluate(base.model, base.tokenizer, self.ranks, command.evaluation, base.device)

    # -- leaving, saving, and what can go wrong --------------------------------------------------------

    def _export(self, resident: Resident) -> Adapter:
        return self.base.slots.export(resident.slot, resident.spec.adapter, self.base.spec.name)

    def _save(self, resident: Resident) -> CheckpointSaved | JobStopped:
        spec = resident.spec
        folder = Path(spec.checkpoint_dir)
        state = checkpoint.Checkpoint(
            self._export(resident),
            resident.optimizer.tensors(),
            resident.progress(),
        )
        problem = self._written(lambda: checkpoint.save(folder, state, self.base.spec.digest))
        if problem:
            return self._stop(resident, *problem)
        path = checkpoint.path_of(folder, resident.step)
        return CheckpointSaved(spec.job, spec.attempt, resident.step, str(path))

    def _stop(self, resident: Resident, code: StopCode, message: str) -> JobStopped:
        self._leave(resident)
        return JobStopped(resident.spec.job, resident.spec.attempt, resident.step, code, message)

    def _leave(self, resident: Resident) -> None:
        del self.residents[resident.spec.job]
        self._credit.pop(resident.spec.job, None)
        self.base.slots.free(resident.slot)

    def _written(self, write: Callable[[], object]) -> tuple[StopCode, str] | None:
        """Let rank 0 write; every rank learns how it went."""
        problem: tuple[StopCode, str] | None = None
        if self.ranks.rank == 0:
            try:
                write()
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                problem = ("disk_full" if full else "internal_error", f"cannot save: {error}")
        return self.ranks.broadcast(problem)

    def _together(self, act: Callable[[], T]) -> tuple[T | None, str]:
        """`act` on every rank. If it refuses on one it counts as refused on all, with the first message."""
        value, message = None, ""
        try:
            value = act()
        except (BadInput, CorruptFolder, OSError) as error:
            message = str(error) or type(error).__name__
        messages = [other for other in self.ranks.gather(message) if other]
        return (None, messages[0]) if messages else (value, "")
