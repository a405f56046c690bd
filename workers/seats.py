"""Who sits on a host: taking a slot, saving what is there, leaving, and what can go wrong on the way.

Collective: all ranks hold the same residents and make the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from workers import checkpoint, mirror
from workers.adapter import Adapter
from workers.base import Base
from workers.capacity import Capacity
from workers.disk import Problem
from workers.encoded import read, sources
from workers.inputs import gram_matrices
from workers.joins import Prepared
from workers.ranks import Ranks
from workers.resident import Resident, settle
from workers.saves import Saves, Told
from workers.together import on_all
from workers.types import CheckpointSaved, Event, JobSpec, JobStopped, StopCode, TrainingFinished


class Seats:
    def __init__(self, base: Base, ranks: Ranks, capacity: Capacity, slots: Iterator[int]) -> None:
        """`slots` gives numbers that no slot of the host has."""
        self._base, self._ranks, self._capacity, self._slots = base, ranks, capacity, slots
        self._saves = Saves(ranks)
        self.residents: dict[str, Resident] = {}
        self.credit: dict[str, int] = {}
        """Tokens of former ticks that a resident has not spent."""

    @property
    def saving(self) -> bool:
        return self._saves.under_way

    @property
    def adapter_parameters(self) -> int:
        """Of all slots together."""
        return sum(resident.adapter_parameters for resident in self.residents.values())

    def has_room(self, parameters: int) -> bool:
        """For slots of so many parameters beside the residents', by the memory model."""
        return self._capacity.takes(self.adapter_parameters + parameters)

    def able(self) -> dict[str, Resident]:
        """The residents but those that are a step ahead of a checkpoint that is not durable yet, or would
        wait for it after the next step.

        They sit out: a kill undoes what lies between two checkpoints and one step, however slow the disk or
        the object store, and no neighbour waits with them.
        """
        return {job: resident for job, resident in self.residents.items() if not self._waits(resident)}

    def _waits(self, resident: Resident) -> bool:
        job, training = resident.spec.job, resident.spec.training
        saves_next = self._saves.of(job) and resident.due(training.saves_per_epoch, ahead=1)
        return saves_next or self._saves.behind(job, resident.step)

    def close(self) -> list[Event]:
        """Returns when all that was being saved is durable, and says so."""
        events = self.saved(lambda _: True)
        self._saves.close()
        self.residents.clear()
        return events

    # -- coming ----------------------------------------------------------------------------------------

    def take(self, spec: JobSpec, prepared: Prepared) -> Resident | JobStopped:
        """Give a job its slot, and one to each of its teachers."""
        slot = next(self._slots)
        readers = len(spec.distill.teachers) if spec.distill and spec.distill.labels < 1 else 0
        teachers = tuple(next(self._slots) for _ in range(readers))
        resident, problem = on_all(self._ranks, lambda: self._settle(spec, slot, teachers, prepared))
        problem = self._unforeseen(problem) if problem else self._too_large(resident)
        if problem:
            self._free(slot, *teachers)
            return JobStopped(spec.job, spec.attempt, 0, *problem)
        self.residents[spec.job] = resident
        return resident

    def _unforeseen(self, problem: Problem) -> Problem:
        """A job whose slot could not be had waits, unless it had the host to itself."""
        code, words = problem
        if code != "out_of_memory":
            return problem
        self._capacity.was_mistaken()
        if not self.residents:
            return code, f"it does not fit in the memory of this host: {words}"
        return "waits_for_memory", f"it does not fit beside the host's other residents: {words}"

    def _settle(self, spec: JobSpec, slot: int, teachers: tuple[int, ...], prepared: Prepared) -> Resident:
        encoded = read(prepared.rows, len(sources(spec))) if prepared.rows else None
        return settle(self._base, spec, slot, teachers, prepared.checkpoint, encoded)

    def _too_large(self, resident: Resident) -> Problem | None:
        """Why a job does not get its slot, by the memory model."""
        own, taken = resident.adapter_parameters, self.adapter_parameters
        if self._capacity.takes(taken + own):
            return None
        words = f"its adapter of {own:,} parameters does not fit"
        if self._capacity.takes(own):
            return "waits_for_memory", f"{words} beside {taken:,} of other residents"
        return "out_of_memory", f"{words} in the memory of this host"

    # -- saving ----------------------------------------------------------------------------------------

    def save(self, resident: Resident) -> list[Event]:
        """Begin a checkpoint, once the job's last one is durable: memory holds one copy of a job at most."""
        spec, digest = resident.spec, self._base.spec.digest
        events = self.settled(spec.job)
        if spec.job not in self.residents:
            return events
        state = checkpoint.Checkpoint(
            self._export(resident),
            resident.optimizer.tensors(),
            resident.progress(),
        )
        path = checkpoint.path_of(Path(spec.checkpoint_dir), resident.step)
        saved = CheckpointSaved(spec.job, spec.attempt, resident.step, str(path))
        self._saves.begin(saved, lambda: mirror.save(spec, state, digest))
        return events

    def publish(self, resident: Resident) -> None:
        """Begin to write a finished job's adapter; its slot is free."""
        spec, path = resident.spec, Path(resident.spec.checkpoint_dir) / "adapter"
        finished = TrainingFinished(spec.job, spec.attempt, resident.step, str(path))
        adapter, digest = self._export(resident), self._base.spec.digest
        grams = gram_matrices(self._base, self._ranks, resident)
        self._saves.begin(finished, lambda: mirror.save_adapter(spec, path, adapter, digest, grams))
        self.leave(resident)

    def _export(self, resident: Resident) -> Adapter:
        return self._base.slots.export(resident.slot, resident.spec.adapter, self._base.spec.name)

    def settled(self, job: str) -> list[Event]:
        """Wait for all that is being saved of a job."""
        return self.saved(lambda event: event.job == job) if self._saves.of(job) else []

    def saved(
        self, wait_for: Callable[[Told], bool] = lambda _: False, seconds: float = math.inf
    ) -> list[Event]:
        """What has become durable; a job that could not be saved is stopped. Waits for what is picked, at
        most so long."""
        events: list[Event] = []
        for event, problem in self._saves.ended(wait_for, seconds):
            resident = self.residents.get(event.job)
            if problem is None:
                events.append(event)
            elif resident is not None and resident.spec.attempt == event.attempt:
                events.append(self.stop(resident, *problem))
            else:
                events.append(JobStopped(event.job, event.attempt, event.step, *problem))
        return events

    # -- leaving ---------------------------------------------------------------------------------------

    def stop(self, resident: Resident, code: StopCode, message: str) -> JobStopped:
        self.leave(resident)
        return JobStopped(resident.spec.job, resident.spec.attempt, resident.step, code, message)

    def leave(self, resident: Resident) -> None:
        del self.residents[resident.spec.job]
        self.credit.pop(resident.spec.job, None)
        self._free(resident.slot, *resident.teachers)

    def _free(self, *slots: int) -> None:
        for slot in slots:
            self._base.adapters.free(slot)
