"""The training in a tick: compose, the passes, a step of each job whose batch is complete, what is due then.

Collective: all ranks train the same residents.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from workers.base import Base
from workers.capacity import Capacity
from workers.compose import MicroBatch, compose
from workers.passes import Passes
from workers.ranks import Ranks
from workers.resident import Resident
from workers.seats import Seats
from workers.step import Share, forward_only, reduce_gradients, target_count
from workers.types import Event, OutOfMemory


class Training:
    def __init__(self, base: Base, ranks: Ranks, capacity: Capacity, seats: Seats) -> None:
        self._base, self._ranks, self._capacity, self._seats = base, ranks, capacity, seats
        self._passes = Passes(base, ranks)

    def go_on(self, residents: Mapping[str, Resident]) -> list[Event]:
        """One composition over these residents, then a step for every job whose batch is complete."""
        composition = compose(
            {job: resident.chunks for job, resident in residents.items()},
            self._seats.credit,
            self._capacity.tokens_per_tick,
            {job: resident.spec.weight for job, resident in residents.items()},
            self._capacity.tokens_per_pass,
        )
        self._seats.credit = dict(composition.credit)
        self._capacity.before_tick()
        parameters, started = self._seats.adapter_parameters, time.monotonic()
        for micro_batch in composition.micro_batches:
            if not self._run(micro_batch):
                return [*self._ran_out(micro_batch), *self._end_steps()]
        if self._capacity.calibrating and self._base.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock would time the queueing alone
        seconds = time.monotonic() - started
        events = self._end_steps()
        largest = max(micro_batch.tokens for micro_batch in composition.micro_batches)
        measured = self._capacity.after_tick(composition.tokens, largest, seconds, parameters)
        return [*events, measured] if measured else events

    # -- passes ----------------------------------------------------------------------------------------

    def _run(self, micro_batch: MicroBatch) -> bool:
        """One pass; its chunks are done. False, and nothing done, if memory ran out."""
        residents = self._seats.residents
        shares = {job: residents[job].share for job, _ in micro_batch.chunks}
        losses = self._passes.run(micro_batch, shares)
        if losses is None:
            return False
        for job, chunk in micro_batch.chunks:
            resident = residents[job]
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
        resident, alone = self._seats.residents[job], len(micro_batch.chunks) == 1
        if alone and chunk.rows_per_rank == 1:
            words = f"a row of {chunk.longest} tokens does not fit; lower sequence_len"
            return [self._seats.stop(resident, "out_of_memory", words)]
        if alone:
            resident.chunk_tokens = chunk.tokens // 2
        else:
            self._capacity.ran_out(micro_batch.tokens)
        for other, _ in micro_batch.chunks:
            self._seats.residents[other].begin_step_again(self._base, self._ranks)
        most = resident.chunk_tokens if alone else self._capacity.tokens_per_pass
        spec = resident.spec
        return [OutOfMemory(job, spec.attempt, resident.step, micro_batch.tokens, most)]

    # -- steps -----------------------------------------------------------------------------------------

    def _end_steps(self) -> list[Event]:
        """The step of every job whose last chunk has run; between two ticks every resident has chunks."""
        complete = [resident for resident in self._seats.residents.values() if not resident.chunks]
        if not complete:
            return []
        losses = torch.stack([resident.loss_on(self._base.device) for resident in complete])
        losses_summed = self._ranks.begin_sum(losses)
        gradients_summed = reduce_gradients(self._ranks, [r.optimizer.slot.weights for r in complete])
        found: list[torch.Tensor] = []
        for resident, summed in zip(complete, gradients_summed, strict=True):
            summed()
            found.append(resident.optimizer.step())
        losses_summed()
        norms, events = torch.stack(found), list[Event]()
        # The tick's one look at the device: everything before it is queued there.
        figures = torch.stack([losses.double(), norms.double()]).tolist()
        for resident, loss, norm in zip(complete, *figures, strict=True):
            # Waiting for what one saves may tell that another could not save: that one is stopped already.
            if resident.spec.job in self._seats.residents:
                events += self._end_step(resident, loss, norm)
        return events

    def _end_step(self, resident: Resident, loss: float, grad_norm: float) -> list[Event]:
        """What is due after a step: its report, validation, a checkpoint, the end."""
        training, seats, job = resident.spec.training, self._seats, resident.spec.job
        events: list[Event] = [resident.end_step(loss, grad_norm)]
        if resident.bad_steps >= training.max_bad_steps:
            words = f"the gradient was not finite in {resident.bad_steps} steps in a row"
            events += seats.settled(job)
            stopped = job not in seats.residents  # for what it had under way failed
            return events if stopped else [*events, seats.stop(resident, "diverged", words)]
        if resident.validates and resident.due(training.evals_per_epoch):
            events.append(resident.validated(self.validate(resident)))
        if resident.due(training.saves_per_epoch):
            events += seats.save(resident)
        if job in seats.residents:
            self.begin_or_finish(resident)
        return events

    def begin_or_finish(self, resident: Resident) -> None:
        """Begin the next step, or leave the slot and publish the adapter."""
        if resident.finished:
            self._seats.publish(resident)
        else:
            resident.begin_step(self._base, self._ranks)

    def validate(self, resident: Resident) -> float:
        """Mean loss over the validation rows, without neighbours."""
        share = Share(resident.slot, 0, 0, 0.0, target_count(resident.validation))
        chunks = resident.validation_chunks(self._base, self._ranks)
        total = torch.zeros((), dtype=torch.float64, device=self._base.device)
        for chunk in chunks:
            micro_batch = MicroBatch(chunk.padded_length, (("validation", chunk),))
            for loss in forward_only(self._base, self._ranks, micro_batch, {"validation": share}).values():
                total += loss
        return float(self._ranks.sum_(total))
