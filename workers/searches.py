"""Searches under way on a host: each makes a trial between two ticks, so that residents keep training.

Collective: all ranks hold the same searches. Rank 0 reads and writes the table, and what it holds decides the
weights that all ranks try.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from workers.adapter import Adapter, read_adapter
from workers.base import Base
from workers.evaluate import evaluate
from workers.fuse import fuse_folders
from workers.lora import ALL_ROWS, Segment
from workers.ranks import Ranks
from workers.search import Search, best_plan, fused_by, key_of, read_table, write_table
from workers.together import on_all, on_first
from workers.types import BadInput, EvaluationFailed, Event, SearchDone, SearchSpec, SearchTask


class Searches:
    def __init__(self, base: Base, ranks: Ranks, slots: Iterator[int]) -> None:
        """`slots` gives numbers that no slot of the host has."""
        self._base, self._ranks, self._slots = base, ranks, slots
        self._searches: dict[str, Search] = {}

    @property
    def under_way(self) -> bool:
        return bool(self._searches)

    def begin(self, request: str, spec: SearchSpec) -> None:
        self._searches[request] = Search(spec)

    def go_on(self) -> list[Event]:
        """A trial of every search; what has ended is told."""
        return [event for request in list(self._searches) for event in self._go_on(request)]

    def _go_on(self, request: str) -> list[Event]:
        """The next trial of a search; the fused adapter once there are enough."""
        search, ranks = self._searches[request], self._ranks
        _, problem = on_all(ranks, lambda: self._try_next(search))
        problem = problem or on_first(ranks, lambda: write_table(search))
        if problem:
            del self._searches[request]
            return [EvaluationFailed(request, problem[1])]
        if not search.finished:
            return []
        del self._searches[request]
        task = best_plan(search)
        report, problem = on_all(ranks, lambda: fuse_folders(task) if ranks.rank == 0 else {})
        if report is None:
            assert problem is not None
            return [EvaluationFailed(request, problem[1])]
        return [SearchDone(request, {**ranks.broadcast(report), "search": search.report()})]

    def _try_next(self, search: Search) -> Search:
        """Parents' own scores first, or what a former attempt has of them; then a trial a call."""
        tasks, folders = search.spec.tasks, search.spec.plan.adapter_dirs
        rank, broadcast = self._ranks.rank, self._ranks.broadcast
        if not search.trials and not search.parents:
            former = broadcast(read_table(search.spec) if rank == 0 else None)
            search.parents, search.trials = former.parents, former.trials
        if not search.parents:
            search.parents = {
                key_of(task): self._metric(task, read_adapter(Path(folder)))
                for task, folder in zip(tasks, folders, strict=True)
            }
        if not search.finished:
            weights = broadcast(search.next_weights() if rank == 0 else None)
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
        base, slot = self._base, next(self._slots)
        base.slots.load(slot, adapter)
        try:
            with base.adapters.rows([Segment(slot, 0, ALL_ROWS)]), torch.no_grad():
                report = evaluate(base.model, base.tokenizer, self._ranks, task.evaluation, base.device)
        finally:
            base.adapters.free(slot)
        return report.metrics[task.metric]
