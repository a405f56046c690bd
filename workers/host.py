"""A host: one frozen base, the jobs resident on it, and the tick that trains them all.

Every method is collective: all ranks of a host make the same calls in the same order, hold the same state,
and return the same events. No Ray here; see `workers.serve` for the loop around it.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import torch

from workers import checkpoint
from workers.adapter import Adapter, read_adapter
from workers.base import Base, load_base
from workers.capacity import Capacity
from workers.compose import MicroBatch, compose
from workers.evaluate import evaluate
from workers.fuse import fuse_folders
from workers.lora import Segment
from workers.manifest import verify_folder
from workers.passes import Passes
from workers.ranks import Ranks
from workers.resident import Resident, settle
from workers.search import Search, best_plan, fused_by, key_of, read_table, write_table
from workers.step import Share, forward_only, reduce_gradients, target_count
from workers.together import Problem, on_all, on_first
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
    OutOfMemory,
    SearchDone,
    SearchTask,
    SearchWeights,
    StopCode,
    TrainingFinished,
)

ALL_ROWS = 1 << 40


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
        self._credit: dict[str, int] = {}
        self._slots = count()
        self._searches: dict[str, Search] = {}

    @classmethod
    def load(cls, base: BaseSpec, ranks: Ranks) -> Host:
        """Raises BadInput if the base cannot be used."""
        started = time.monotonic()
        return cls(load_base(base, ranks), ranks, time.monotonic() - started)

    @property
    def busy(self) -> bool:
        return bool(self.residents or self._searches)

    def close(self) -> None:
        self.residents.clear()
        self.ranks.close()

    # -- the tick --------------------------------------------------------------------------------------

    def tick(self) -> list[Event]:
        """The residents train, and every search makes a trial."""
        events = self._train() if self.residents else []
        for request in list(self._searches):
            events += self._search_on(request)
        return events

    def _train(self) -> list[Event]:
        """One composition over the residents, then a step for every job whose batch is complete."""
        composition = compose(
            {job: resident.chunks for job, resident in self.residents.items()},
            self._credit,
            self.capacity.tokens_per_tick,
            {job: resident.spec.weight for job, resident in self.residents.items()},
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
        problem = on_first(
            self.ranks, lambda: checkpoint.save_adapter(path, self._export(resident), self.base.spec.digest)
        )
        if problem:
            return [self._stop(resident, *problem)]
        self._leave(resident)
        return [TrainingFinished(spec.job, spec.attempt, resident.step, str(path))]

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
                return [self._evaluate(command)]
            case SearchWeights(request, spec):
                # Rank 0 reads the table: what it holds decides the weights that all ranks try.
                self._searches[request] = Search(spec)
                return []
            case Close():
                self.close()
                return []

    def _attach(self, spec: JobSpec) -> list[Event]:
        held = self.residents.get(spec.job)
        if held is not None and held.spec.attempt == spec.attempt:
            return []  # said twice
        if held is not None:
            self._leave(held)
        if len(self.residents) >= self.base.spec.slots:
            return [JobStopped(spec.job, spec.attempt, 0, "internal_error", "the host has no free slot")]
        found = checkpoint.newest(Path(spec.checkpoint_dir)) if self.ranks.rank == 0 else None
        path, slot = self.ranks.broadcast(found), next(self._slots)
        readers = len(spec.distill.teachers) if spec.distill and spec.distill.labels < 1 else 0
        teachers = tuple(next(self._slots) for _ in range(readers))
        resident, problem = on_all(self.ranks, lambda: settle(self.base, spec, slot, teachers, path))
        problem = problem or self._too_large(resident)
        if problem:
            self._free(slot, *teachers)
            return [JobStopped(spec.job, spec.attempt, 0, *problem)]
        self.residents[spec.job] = resident
        return [resident.attached(), *resident.reports, *self._go_on(resident)]

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
        report, problem = on_all(self.ranks, lambda: self._score(command, slot))
        self.base.slots.free(slot)
        if problem:
            return EvaluationFailed(command.request, problem[1])
        return EvaluationDone(command.request, report, time.monotonic() - started)

    def _score(self, command: Evaluate, slot: int) -> EvaluationReport:
        base, segments = self.base, []
        if command.adapter_dir is not None:
            verify_folder(Path(command.adapter_dir))
            base.slots.load(slot, read_adapter(Path(command.adapter_dir)))
            segments = [Segment(slot, 0, ALL_ROWS)]
        with base.adapters.rows(segments), torch.no_grad():
            return evaluate(base.model, base.tokenizer, self.ranks, command.evaluation, base.device)

    # -- searching -------------------------------------------------------------------------------------

    def _search_on(self, request: str) -> list[Event]:
        """The next trial of a search; the fused adapter once there are enough."""
        search = self._searches[request]
        _, problem = on_all(self.ranks, lambda: self._try_next(search))
        problem = problem or on_first(self.ranks, lambda: write_table(search))
        if problem:
            del self._searches[request]
            return [EvaluationFailed(request, problem[1])]
        if not search.finished:
            return []
        del self._searches[request]
        task = best_plan(search)
        report, problem = on_all(self.ranks, lambda: fuse_folders(task) if self.ranks.rank == 0 else {})
        if report is None:
            assert problem is not None
            return [EvaluationFailed(request, problem[1])]
        return [SearchDone(request, {**self.ranks.broadcast(report), "search": search.report()})]

    def _try_next(self, search: Search) -> Search:
        """Parents' own scores first, or what a former attempt has of them; then a trial a call."""
        tasks, folders = search.spec.tasks, search.spec.plan.adapter_dirs
        if not search.trials and not search.parents:
            former = self.ranks.broadcast(read_table(search.spec) if self.ranks.rank == 0 else None)
            search.parents, search.trials = former.parents, former.trials
        if not search.parents:
            search.parents = {
                key_of(task): self._metric(task, read_adapter(Path(folder)))
                for task, folder in zip(tasks, folders, strict=True)
            }
        if not search.finished:
            weights = self.ranks.broadcast(search.next_weights() if self.ranks.rank == 0 else None)
            fused = fused_by(search.spec.plan, search.spec.groups, weights)
            search.trials.append(search.judge(weights, {key_of(t): self._tried(t, fused) for t in tasks}))
        return search

    def _tried(self, task: SearchTask, adapter: Adapter) -> float | None:
        """None for weights that yield no finite scores: the parents were scored, so the rows are good."""
        try:
            return self._metric(task, adapter)
        except BadInput:
            return None

    def _metric(self, task: SearchTask, adapter: Adapter) -> float:
        slot = next(self._slots)
        self.base.slots.load(slot, adapter)
        try:
            with self.base.adapters.rows([Segment(slot, 0, ALL_ROWS)]), torch.no_grad():
                base = self.base
                report = evaluate(base.model, base.tokenizer, self.ranks, task.evaluation, base.device)
        finally:
            self.base.slots.free(slot)
        return report.metrics[task.metric]

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
        problem = on_first(self.ranks, lambda: checkpoint.save(folder, state, self.base.spec.digest))
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
        self._free(resident.slot, *resident.teachers)

    def _free(self, *slots: int) -> None:
        for slot in slots:
            self.base.slots.free(slot)
