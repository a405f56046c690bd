"""The wire between controller and hosts, as the state machine sees it: not to be trusted, and counted.

The hosts at its end may outlive the controller, with what they have reported and nobody has taken in.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.orchestrator.lasting import Lasting, Machines
from workers.types import Attached, CheckpointSaved, HostFailed, StepDone

MAY_BE_LOST = (Attached, StepDone, CheckpointSaved)


class Wire(Lasting):
    """Faults act on reports when they are delivered; those held back are not taken in."""

    def __init__(
        self, ranks: int, counts: Counter[str], old: Sequence[Any] = (), machines: Machines | None = None
    ) -> None:
        super().__init__(machines or Machines(), cpus=float(ranks))
        self.counts = counts
        self.queues: dict[str, list[Any]] = {}
        """What comes beside a host's own reports."""
        self.faults_of_wire: list[Callable[[list[Any]], list[Any]]] = []
        self.told: list[Any] = list(old)
        """Everything ever reported: some of it comes again."""
        self.held_back: set[str] = set()

    def poll(self, host: str) -> list[Any]:
        if host in self.held_back:
            if host in self.hosts:
                self.machines.work(host)
            self.counts["polls without an answer"] += 1
            return []
        fresh = super().poll(host)
        self.told += [event for event in fresh if hasattr(event, "attempt")]
        while fresh and self.faults_of_wire:
            fresh = self.faults_of_wire.pop()(fresh)
        return [*fresh, *self.queues.pop(host, [])]

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
