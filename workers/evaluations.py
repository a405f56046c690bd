"""Evaluations that wait on a host: those that wait together are scored together, between two ticks.

Collective: all ranks hold the same ones in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from workers.adapter import read_adapter
from workers.base import Base
from workers.evaluate import Candidate, evaluate_together
from workers.manifest import verify_folder
from workers.ranks import Ranks
from workers.reading import Reader
from workers.together import on_all
from workers.types import BadInput, Evaluate, EvaluationDone, EvaluationFailed, EvaluationReport, Event


class Evaluations:
    def __init__(self, base: Base, ranks: Ranks, slots: Iterator[int]) -> None:
        """`slots` gives numbers that no slot of the host has."""
        self._base, self._ranks, self._slots = base, ranks, slots
        self._waiting: list[Evaluate] = []

    @property
    def under_way(self) -> bool:
        return bool(self._waiting)

    def begin(self, command: Evaluate) -> None:
        self._waiting.append(command)

    def go_on(self, fits: Callable[[int], bool]) -> list[Event]:
        """Score what waits, in shared passes, and tell in the order of asking.

        At most as many adapters at once as the host has slots, and no more than `fits` says of the number of
        their parameters, but for one alone; the others wait on.
        """
        if not self._waiting:
            return []
        started, (slots, refused) = time.monotonic(), self._seat(fits)
        now = [c for c in self._waiting if c.adapter_dir in slots or c.adapter_dir in refused]
        self._waiting = [c for c in self._waiting if c not in now]
        able = [Candidate(slots[c.adapter_dir], c.evaluation) for c in now if c.adapter_dir in slots]
        reports = iter(self._scored(able))
        for slot in slots.values():
            if slot is not None:
                self._base.adapters.free(slot)
        seconds = time.monotonic() - started
        return [_event(c, refused.get(c.adapter_dir) or next(reports), seconds) for c in now]

    def _seat(
        self, fits: Callable[[int], bool]
    ) -> tuple[Mapping[str | None, int | None], Mapping[str | None, BadInput]]:
        """Slots of the adapters that are scored now (the base needs none), and why some cannot be."""
        seated: dict[str | None, int | None] = {}
        refused: dict[str | None, BadInput] = {}
        parameters = 0
        for folder in dict.fromkeys(command.adapter_dir for command in self._waiting):
            if folder is None:
                seated[None] = None
                continue
            slot = next(self._slots)
            own, problem = on_all(self._ranks, lambda: self._load(slot, folder))  # noqa: B023
            full = (problem or ("",))[0] == "out_of_memory" or not fits(parameters + (own or 0))
            if parameters and full:
                self._base.adapters.free(slot)
                break
            if own is None:
                self._base.adapters.free(slot)  # of this rank, if another one refused
                refused[folder] = BadInput(problem[1] if problem else "")
                continue
            seated[folder], parameters = slot, parameters + own
            if len(seated.keys() - {None}) == self._base.spec.slots:
                break
        return seated, refused

    def _load(self, slot: int, folder: str) -> int:
        """The number of its parameters."""
        verify_folder(Path(folder))
        self._base.slots.load(slot, read_adapter(Path(folder)))
        return self._base.slots[slot].weights.numel()

    def _scored(self, candidates: Sequence[Candidate]) -> list[EvaluationReport | BadInput]:
        """Each by itself if what they do together fails."""
        base = self._base
        reader = Reader(base.model, self._ranks, base.device, base.pad_id, base.adapters)
        reports, problem = on_all(self._ranks, lambda: evaluate_together(reader, base.tokenizer, candidates))
        if reports is not None:
            return reports
        assert problem is not None
        if len(candidates) == 1:
            return [BadInput(problem[1])]
        return [report for candidate in candidates for report in self._scored([candidate])]


def _event(command: Evaluate, report: EvaluationReport | BadInput, seconds: float) -> Event:
    if isinstance(report, BadInput):
        return EvaluationFailed(command.request, str(report))
    return EvaluationDone(command.request, report, seconds)
