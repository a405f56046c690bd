"""The wire between controller and hosts, as the state machine sees it: not to be trusted, and counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.orchestrator.fakes import FakeCluster
from workers.types import Attached, CheckpointSaved, HostFailed, StepDone

MAY_BE_LOST = (Attached, StepDone, CheckpointSaved)


class Wire(FakeCluster):
    """Reports pass through a queue for each host, on which faults act."""

    def __init__(self, ranks: int, counts: Counter[str], old: Sequence[Any] = ()) -> None:
        super().__init__(cpus=float(ranks))
        self.counts = counts
        self.queues: dict[str, list[Any]] = {}
        self.faults_of_wire: list[Callable[[list[Any]], list[Any]]] = []
        self.told: list[Any] = list(old)
        """Everything ever reported: some of it comes again."""
        self.held_back: set[str] = set()

    def poll(self, host: str) -> list[Any]:
        queue = self.queues.setdefault(host, [])
        fresh = list(super().poll(host))
        self.told += [event for event in fresh if hasattr(event, "attempt")]
        while fresh and self.faults_of_wire:
            fresh = self.faults_of_wire.pop()(fresh)
        queue += fresh
        if host in self.held_back:
            self.counts["reports held back"] += len(fresh)
            return []
        self.queues[host] = []
        return queue

    def lose(self, host: str) -> None:
        """A rank dies: all of the host goes, and what was not delivered with it."""
        self.counts["hosts lost by the loss of a rank"] += 1
        self.stop_host(host)
        self.held_back.discard(host)
        self.queues[host] = [HostFailed("rank 1 died")]

    # ---- faults ----------------------------------------------------------------------------------------

    def doubled(self, events: list[Any]) -> list[Any]:
        self.counts["reports doubled"] += len(events)
        return [again for event in events for again in (event, event)]

    def reordered(self, events: list[Any], seed: int) -> list[Any]:
        mixed = random.Random(seed).sample(events, len(events))
        self.counts["reports out of order"] += sum(a is not b for a, b in zip(events, mixed, strict=True))
        return mixed

    def dropped(self, events: list[Any]) -> list[Any]:
        kept = [event for event in events if not isinstance(event, MAY_BE_LOST)]
        self.counts["reports lost"] += len(events) - len(kept)
        return kept
