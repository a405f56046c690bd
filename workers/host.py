"""A host: one frozen base, the jobs resident on it, and the tick that trains them all.

Every method is collective: all ranks of a host make the same calls in the same order, hold the same state,
and return the same events. No Ray here; see `workers.serve` for the loop around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch

from workers import checkpoint
from workers.adapter import Adapter
from workers.base import Base, load_base
from workers.capacity import Capacity
from workers.compose import MicroBatch, compose
from workers.encoded import read, sources
from workers.evaluations import Evaluations
from workers.inputs import gram_matrices
from workers.joins import Joins, Prepared, remove
from workers.passes import Passes
from workers.ranks import Ranks
from workers.resident import Resident, settle
from workers.saves import Saves, Told
from workers.searches import Searches
from workers.step import Share, forward_only, reduce_gradients, target_count
from workers.together import Problem, on_all
from workers.types import (
    Attach,
    BaseSpec,
    CheckpointSaved,
    Close,
    Command,
    Detach,
    Detached,
    Evaluate,
    Event,
    HostReady,
    JobSpec,
    JobStopped,
    OutOfMemory,
    SearchWeights,
    StopCode,
    TrainingFinished,
)

JOIN_SECONDS = 0.5
"""Longest wait of a tick that has nothing else to do for jobs that are on their way in."""


class Host:
    def __init__(self, base: Base, ranks: Ranks, load_seconds: float) -> None:
        self.base = base
        self.ranks = ranks
        self.residents: dict[str, Resident] = {}
        self.ready = HostReady(
            ranks.world_size, base.zero, base.spec.slots, base.parameters, round(load_seconds, 3)
        )
        self.capacity = Capacity(base.spec, ranks, base.bytes_per_parameter)
        self._passes = Passes(base, ranks)
        self._saves = Saves(ranks)
        self._joins = Joins(ranks, base.spec.path)
        self._credit: dict[str, int] = {}
        self._slots = count()
        self._searches = Searches(base, ranks, self._slots)
        self._evaluations = Evaluations(base, ranks, self._slots)

    @classmethod
    def load(cls, base: BaseSpec, ranks: Ranks) -> Host:
        """Raises BadInput if the base cannot be used."""
        started = time.monotonic()
        return cls(load_base(base, ranks), ranks, time.monotonic() - started)

    @property
    def busy(self) -> bool:
        """Whether a tick has anything to do: train, score, search, take in, or see what is saved on disk."""
        return bool(self.residents or self._joins) or self._judging or self._saves.under_way

    @property
    def joining(self) -> int:
        """Jobs that are on their way in."""
        return len(self._joins)

    @property
    def _judging(self) -> bool:
        return self._searches.under_way or self._evaluations.under_way

    def close(self) -> list[Event]:
        """Returns when all that was asked is scored and all that was being saved is durable, and says so."""
        events: list[Event] = []
        self._joins.close()
        while self._evaluations.under_way:
            events += self._evaluations.go_on(self._has_room)
        events += self._saved(lambda _: True)
        self._saves.close()
        self.residents.clear()
        self.ranks.close()
        return events

    # -- the tick --------------------------------------------------------------------------------------

    def tick(self) -> list[Event]:
        """What has become durable is told, jobs whose rows are encoded join, what waits to be scored is, the
        residents train, and every search makes a trial.

        With none of these to do it waits for those on their way in, or for what is not durable yet.
        """
        idle = not self._training and not self._judging
        events = self._saved(lambda _: idle and not self._joins)
        events += self.take_in(JOIN_SECONDS if idle else 0.0)
        events += self._evaluations.go_on(self._has_room)
        if training := self._training:
            events += self._train(training)
        return events + self._searches.go_on()

    @property
    def _training(self) -> dict[str, Resident]:
        """The residents but those that are a step ahead of a checkpoint that is not durable yet.

        They sit out: a kill undoes what lies between two checkpoints and one step, however slow the disk.
        """
        return {
            job: resident
            for job, resident in self.residents.items()
            if not self._saves.behind(job, resident.step)
        }

    def _train(self, training: Mapping[str, Resident]) -> list[Event]:
        """One composition over these residents, then a step for every job whose batch is complete."""
        composition = compose(
            {job: resident.chunks for job, resident in training.items()},
            self._credit,
            self.capacity.tokens_per_tick,
            {job: resident.spec.weight for job, resident in training.items()},
            self.capacity.tokens_per_pass,
        )
        self._credit = dict(composition.credit)
        parameters, started = self.adapter_parameters, time.monotonic()
        for micro_batch in composition.micro_batches:
            if not self._run(micro_batch):
                return self._ran_out(micro_batch)
        if self.capacity.calibrating and self.base.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock would time the queueing alone
        seconds = time.monotonic() - started
        events = self._end_steps([resident for resident in self.residents.values() if not resident.chunks])
        largest = max(micro_batch.tokens for micro_batch in composition.micro_batches)
        measured = self.capacity.after_tick(composition.tokens, largest, seconds, parameters)
        return [*events, measured] if measured else events

    @property
    def adapter_parameters(self) -> int:
        """Of all slots together."""
        return sum(resident.adapter_parameters for resident in self.residents.values())

    def _has_room(self, parameters: int) -> bool:
        """For slots of so many parameters beside the residents', by the memory model."""
        return self.capacity.takes(self.adapter_parameters + parameters)

    def _run(self, micro_batch: MicroBatch) -> bool:
        """One pass; its chunks are done. False, and nothing done, if memory ran out."""
        shares = {job: self.residents[job].share for job, _ in micro_batch.chunks}
        losses = self._passes.run(micro_batch, shares)
        if losses is None:
            return False
        for job, chunk in micro_batch.chunks:
            resident = self.residents[job]
            done = resident.chunks.pop(0)
            assert done is chunk, "a job's chunks run in their own order"
            resident.loss += losses.get(job, 0.0)
        return True

    def _ran_out(self, micro_batch: MicroBatch) -> list[Event]:
        """Make passes smaller; the jobs of this one begin their step again, the others keep what they did.

        A pass of several chunks may hold half as much from now on. A chunk alone is cut in two, which moves
        the last bits of that job's sums; a job of which one row does not fit is stopped.
        """
        job, chunk = max(micro_batch.chunks, key=lambda item: item[1].tokens)
        resident, alone = self.residents[job], len(micro_batch.chunks) == 1
        if alone and chunk.rows_per_rank == 1:
            words = f"a row of {chunk.padded_length} tokens does not fit; lower sequence_len"
            return [self._stop(resident, "out_of_memory", words)]
        if alone:
            resident.chunk_tokens = chunk.tokens // 2
        else:
            self.capacity.ran_out(micro_batch.tokens)
        for other, _ in micro_batch.chunks:
            self.residents[other].begin_step_again(self.base, self.ranks)
        most = resident.chunk_tokens if alone else self.capacity.tokens_per_pass
        spec = resident.spec
        return [OutOfMemory(job, spec.attempt, resident.step, micro_batch.tokens, most)]

    def _end_steps(self, complete: list[Resident]) -> list[Event]:
        if not complete:
            return []
        losses = torch.stack([resident.loss_on(self.base.device) for resident in complete])
        losses_summed = self.ranks.begin_sum(losses)
        gradients_summed = reduce_gradients(self.ranks, [r.optimizer.slot.weights for r in complete])
        found: list[torch.Tensor] = []
        for resident, summed in zip(complete, gradients_summed, strict=True):
            summed()
            found.append(resident.optimizer.step())
        losses_summed()
        norms, events = torch.stack(found), list[Event]()
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
            events += self._settled(resident.spec.job)
            stopped = resident.spec.job not in self.residents  # for what it had under way failed
            return events if stopped else [*events, self._stop(resident, "diverged", words)]
        if resident.validates and resident.due(training.evals_per_epoch):
            events.append(resident.validated(self._validate(resident)))
        if resident.due(training.saves_per_epoch):
            events += self._save(resident)
        if resident.spec.job not in self.residents:
            return events
        return [*events, *self._go_on(resident)]

    def _go_on(self, resident: Resident) -> list[Event]:
        """Begin the next step, or finish: leave the slot, and publish the adapter."""
        if not resident.finished:
            resident.begin_step(self.base, self.ranks)
            return []
        spec, path = resident.spec, Path(resident.spec.checkpoint_dir) / "adapter"
        finished = TrainingFinished(spec.job, spec.attempt, resident.step, str(path))
        adapter, digest = self._export(resident), self.base.spec.digest
        grams = gram_matrices(self.base, self.ranks, resident)
        self._saves.begin(finished, lambda: checkpoint.save_adapter(path, adapter, digest, grams))
        self._leave(resident)
        return []

    def _validate(self, resident: Resident) -> float:
        """Mean loss over the validation rows, without neighbours."""
        share = Share(resident.slot, 0, 0, 0.0, target_count(resident.validation))
        chunks = resident.validation_chunks(self.base, self.ranks)
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
                self._evaluations.begin(command)
                return []
            case SearchWeights(request, spec):
                self._searches.begin(request, spec)
                return []
            case Close():
                return self.close()

    def _attach(self, spec: JobSpec) -> list[Event]:
        held = self.residents.get(spec.job)
        if spec.attempt in (held.spec.attempt if held else None, self._joins.attempt(spec.job)):
            return []  # said twice
        if held is not None:
            self._leave(held)
        if self._joins.attempt(spec.job) is not None:
            self._joins.drop(spec.job)
        # A former attempt may still be on its way to the disk, and this one goes on from it.
        told = self._settled(spec.job)
        if len(self.residents) + len(self._joins) >= self.base.spec.slots:
            words = "the host has no free slot"
            return [*told, JobStopped(spec.job, spec.attempt, 0, "internal_error", words)]
        prepared = self._joins.begin(spec)
        return [*told, *self._seat(spec, prepared)] if prepared else told

    def take_in(self, seconds: float = 0.0) -> list[Event]:
        """Jobs whose rows are encoded become resident; waits so long for the others. Every tick does it."""
        events: list[Event] = []
        for spec, (prepared, problem) in self._joins.ended(seconds):
            if problem:
                events.append(JobStopped(spec.job, spec.attempt, 0, *problem))
            else:
                events += self._seat(spec, prepared)
            if prepared.rows and self.ranks.rank == 0:
                remove(prepared.rows)
        return events

    def _seat(self, spec: JobSpec, prepared: Prepared) -> list[Event]:
        slot = next(self._slots)
        readers = len(spec.distill.teachers) if spec.distill and spec.distill.labels < 1 else 0
        teachers = tuple(next(self._slots) for _ in range(readers))
        resident, problem = on_all(self.ranks, lambda: self._settle(spec, slot, teachers, prepared))
        problem = problem or self._too_large(resident)
        if problem:
            self._free(slot, *teachers)
            return [JobStopped(spec.job, spec.attempt, 0, *problem)]
        self.residents[spec.job] = resident
        return [resident.attached(), *resident.reports, *self._go_on(resident)]

    def _settle(self, spec: JobSpec, slot: int, teachers: tuple[int, ...], prepared: Prepared) -> Resident:
        encoded = read(prepared.rows, len(sources(spec))) if prepared.rows else None
        return settle(self.base, spec, slot, teachers, prepared.checkpoint, encoded)

    def _too_large(self, resident: Resident) -> Problem | None:
        """Why a job does not get its slot, by the memory model."""
        own, taken = resident.adapter_parameters, self.adapter_parameters
        if self.capacity.takes(taken + own):
            return None
        words = f"its adapter of {own:,} parameters does not fit"
        if self.capacity.takes(own):
            return "waits_for_memory", f"{words} beside {taken:,} of other residents"
        return "out_of_memory", f"{words} in the memory of this host"

    def _detach(self, job: str, attempt: int) -> list[Event]:
        if self._joins.attempt(job) == attempt:
            self._joins.drop(job)
            return [Detached(job, attempt, 0)]
        resident = self.residents.get(job)
        if resident is None or resident.spec.attempt != attempt:
            return []
        events = self._save(resident) if resident.step else []
        events += self._settled(job)
        if job not in self.residents:
            return events  # it could not be saved
        self._leave(resident)
        return [*events, Detached(job, attempt, resident.step)]

    # -- leaving, saving, and what can go wrong --------------------------------------------------------

    def _export(self, resident: Resident) -> Adapter:
        return self.base.slots.export(resident.slot, resident.spec.adapter, self.base.spec.name)

    def _save(self, resident: Resident) -> list[Event]:
        """Begin a checkpoint, once the job's last one is durable: memory holds one copy of a job at most."""
        spec, folder, digest = resident.spec, Path(resident.spec.checkpoint_dir), self.base.spec.digest
        events = self._settled(spec.job)
        if spec.job not in self.residents:
            return events
        state = checkpoint.Checkpoint(
            self._export(resident),
            resident.optimizer.tensors(),
            resident.progress(),
        )
        path = checkpoint.path_of(folder, resident.step)
        saved = CheckpointSaved(spec.job, spec.attempt, resident.step, str(path))
        self._saves.begin(saved, lambda: checkpoint.save(folder, state, digest))
        return events

    def _settled(self, job: str) -> list[Event]:
        """Wait for all that is being saved of a job."""
        return self._saved(lambda event: event.job == job) if self._saves.of(job) else []

    def _saved(self, wait_for: Callable[[Told], bool] = lambda _: False) -> list[Event]:
        """What has become durable; a job that could not be saved is stopped. Waits for what is picked."""
        events: list[Event] = []
        for event, problem in self._saves.ended(wait_for):
            resident = self.residents.get(event.job)
            if problem is None:
                events.append(event)
            elif resident is not None and resident.spec.attempt == event.attempt:
                events.append(self._stop(resident, *problem))
            else:
                events.append(JobStopped(event.job, event.attempt, event.step, *problem))
        return events

    def _stop(self, resident: Resident, code: StopCode, message: str) -> JobStopped:
        self._leave(resident)
        return JobStopped(resident.spec.job, resident.spec.attempt, resident.step, code, message)

    def _leave(self, resident: Resident) -> None:
        del self.residents[resident.spec.job]
        self._credit.pop(resident.spec.job, None)
        self._free(resident.slot, *resident.teachers)

    def _free(self, *slots: int) -> None:
        for slot in slots:
            self.base.adapters.free(slot)
