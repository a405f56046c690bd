"""A host: one frozen base, the jobs resident on it, and the tick that trains them all.

Every method is collective: all ranks of a host make the same calls in the same order, hold the same state,
and return the same events. No Ray here; see `workers.serve` for the loop around it.
"""

from __future__ import annotations

import time
from itertools import count

from workers.base import Base, load_base
from workers.capacity import Capacity
from workers.evaluations import Evaluations
from workers.joins import Joins, Prepared, remove
from workers.ranks import Ranks
from workers.resident import Resident
from workers.searches import Searches
from workers.seats import Seats
from workers.training import Training
from workers.types import (
    Attach,
    BaseSpec,
    Close,
    Command,
    Detach,
    Detached,
    Evaluate,
    Event,
    HostReady,
    JobSpec,
    JobStopped,
    SearchWeights,
)

IDLE_SECONDS = 0.5
"""Longest wait of a tick that has nothing else to do, for jobs on their way in or for what is being saved."""


class Host:
    def __init__(self, base: Base, ranks: Ranks, load_seconds: float) -> None:
        self.base = base
        self.ranks = ranks
        self.ready = HostReady(
            ranks.world_size, base.zero, base.spec.slots, base.parameters, round(load_seconds, 3)
        )
        slots = count()
        self.capacity = Capacity(base.spec, ranks, base.bytes_per_parameter)
        self._seats = Seats(base, ranks, self.capacity, slots)
        self._joins = Joins(ranks, base.spec.path)
        self._searches = Searches(base, ranks, slots)
        self._evaluations = Evaluations(base, ranks, slots)
        self.training = Training(base, ranks, self.capacity, self._seats)

    @classmethod
    def load(cls, base: BaseSpec, ranks: Ranks) -> Host:
        """Raises BadInput if the base cannot be used."""
        started = time.monotonic()
        return cls(load_base(base, ranks), ranks, time.monotonic() - started)

    @property
    def residents(self) -> dict[str, Resident]:
        return self._seats.residents

    @property
    def adapter_parameters(self) -> int:
        """Of all slots together."""
        return self._seats.adapter_parameters

    @property
    def joining(self) -> int:
        """Jobs that are on their way in."""
        return len(self._joins)

    @property
    def busy(self) -> bool:
        """Whether a tick has anything to do: train, score, search, take in, or see what is saved on disk."""
        return bool(self.residents or self._joins) or self._judging or self._seats.saving

    @property
    def _judging(self) -> bool:
        return self._searches.under_way or self._evaluations.under_way

    def close(self) -> list[Event]:
        """Returns when all that was asked is scored and all that was being saved is durable, and says so."""
        events: list[Event] = []
        self._joins.close()
        while self._evaluations.under_way:
            events += self._evaluations.go_on(self._seats.has_room)
        events += self._seats.close()
        self.ranks.close()
        return events

    def tick(self) -> list[Event]:
        """What has become durable is told, jobs whose rows are encoded join, what waits to be scored is, the
        residents train, and every search makes a trial.

        With none of these to do it waits a while for those on their way in, or for what is not durable yet.
        """
        idle = not self._seats.able() and not self._judging
        events = self._seats.saved(lambda _: idle and not self._joins, IDLE_SECONDS)
        events += self.take_in(IDLE_SECONDS if idle else 0.0)
        events += self._evaluations.go_on(self._seats.has_room)
        if able := self._seats.able():
            events += self.training.go_on(able)
        return events + self._searches.go_on()

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
            self._seats.leave(held)
        if self._joins.attempt(spec.job) is not None:
            self._joins.drop(spec.job)
        # A former attempt may still be on its way to the disk, and this one goes on from it.
        told = self._seats.settled(spec.job)
        if len(self.residents) + len(self._joins) >= self.base.spec.slots:
            words = "the host has no free slot"
            return [*told, JobStopped(spec.job, spec.attempt, 0, "internal_error", words)]
        prepared = self._joins.begin(spec)
        return [*told, *self._seat(spec, prepared)] if prepared else told

    def _seat(self, spec: JobSpec, prepared: Prepared) -> list[Event]:
        resident = self._seats.take(spec, prepared)
        if isinstance(resident, JobStopped):
            return [resident]
        told: list[Event] = [resident.attached(), *resident.reports]
        self.training.begin_or_finish(resident)
        return told

    def _detach(self, job: str, attempt: int) -> list[Event]:
        if self._joins.attempt(job) == attempt:
            self._joins.drop(job)
            return [Detached(job, attempt, 0)]
        resident = self.residents.get(job)
        if resident is None or resident.spec.attempt != attempt:
            return []
        events = self._seats.save(resident) if resident.step else []
        events += self._seats.settled(job)
        if job not in self.residents:
            return events  # it could not be saved
        self._seats.leave(resident)
        return [*events, Detached(job, attempt, resident.step)]
