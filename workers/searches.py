"""Searches under way on a host: each makes a trial between two ticks, so that residents keep training.

Collective: all ranks hold the same searches. Rank 0 reads and writes the table, and what it holds decides the
weights that all ranks try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from workers.adapter import Adapter, read_adapter
from workers.base import Base
from workers.disk import Problem
from workers.evaluate import Candidate, evaluate_together
from workers.fuse import fuse_folders
from workers.ranks import Ranks
from workers.reading import Reader
from workers.search import Search, best_plan, fused_by, key_of, read_table, write_table
from workers.together import on_all, on_first, on_first_at_length
from workers.types import (
    BadInput,
    EvaluationFailed,
    Event,
    Progress,
    SearchAdvanced,
    SearchDone,
    SearchSpec,
    SearchTask,
)


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
        """A trial of every search, which is told, and so is what has ended."""
        return [event for request in list(self._searches) for event in self._go_on(request)]

    def _go_on(self, request: str) -> list[Event]:
        """The next trial of a search; the fused adapter once there are enough."""
        search, ranks = self._searches[request], self._ranks
        problem = self._take_up(search)
        if problem is None:
            _, problem = on_all(ranks, lambda: self._try_next(search))
        problem = problem or on_first(ranks, lambda: write_table(search))
        if problem:
            del self._searches[request]
            return [EvaluationFailed(request, problem[1])]
        advanced = SearchAdvanced(request, Progress(len(search.trials), search.spec.trials))
        if not search.finished:
            return [advanced]
        del self._searches[request]
        report, problem = on_first_at_length(ranks, lambda: fuse_folders(best_plan(search)))
        if report is None:
            assert problem is not None
            return [EvaluationFailed(request, problem[1])]
        return [advanced, SearchDone(request, {**report, "search": search.report()})]

    def _take_up(self, search: Search) -> Problem | None:
        """What a former attempt has of a search that begins."""
        if search.trials or search.parents:
            return None
        spec, first = search.spec, self._ranks.rank == 0
        former, problem = on_all(self._ranks, lambda: read_table(spec) if first else Search(spec))
        if former is None:
            return problem
        former = self._ranks.broadcast(former)
        search.parents, search.trials = former.parents, former.trials
        return None

    def _try_next(self, search: Search) -> Search:
        """Parents' own scores first, if no former attempt has them; then a trial a call.

        Raises BadInput on all ranks alike.
        """
        tasks, folders = search.spec.tasks, search.spec.plan.adapter_dirs
        if not search.parents:
            own = [self._own_score(*pair) for pair in zip(tasks, folders, strict=True)]
            search.parents = {key_of(task): score for task, score in zip(tasks, own, strict=True)}
        if not search.finished:
            weights = self._ranks.broadcast(search.next_weights() if self._ranks.rank == 0 else None)
            scores = self._scores(tasks, lambda: fused_by(search.spec.plan, search.spec.groups, weights))
            # No score for weights that yield no finite one: the parents were scored, so the rows are good.
            found = {
                key_of(t): None if isinstance(s, BadInput) else s for t, s in zip(tasks, scores, strict=True)
            }
            search.trials.append(search.judge(weights, found))
        return search

    def _own_score(self, task: SearchTask, folder: str) -> float:
        (found,) = self._scores([task], lambda: read_adapter(Path(folder)))
        if isinstance(found, BadInput):
            raise found
        return found

    def _scores(self, tasks: Sequence[SearchTask], make: Callable[[], Adapter]) -> list[float | BadInput]:
        """Of one adapter on each task, in shared passes. Raises BadInput if a rank cannot have it."""
        base, slot = self._base, next(self._slots)
        reader = Reader(base.model, self._ranks, base.device, base.pad_id, base.adapters)
        _, problem = on_all(self._ranks, lambda: self._seat(slot, make()))
        try:
            if problem:
                raise BadInput(problem[1])
            reports = evaluate_together(
                reader, base.tokenizer, [Candidate(slot, t.evaluation) for t in tasks]
            )
        finally:
            base.adapters.free(slot)
        return [
            report if isinstance(report, BadInput) else report.metrics[task.metric]
            for task, report in zip(tasks, reports, strict=True)
        ]

    def _seat(self, slot: int, adapter: Adapter) -> int:
        self._base.slots.load(slot, adapter)
        return slot
