"""How much a host takes on: its token budget, the bound of a pass, and room for adapters; measured on ticks.

All ranks hold the same state: rank 0 decides about speed and all are asked about memory, at ticks that every
rank knows.
"""

from __future__ import annotations

import socket

from workers.budget import Knee
from workers.memory import Peaks, adapter_room, limit_bytes, pass_room, worst
from workers.ranks import Ranks
from workers.types import BaseSpec, HostMeasured, MemoryModel

FIRST_REPORT = 16
"""Ticks after which memory is fitted first; then after twice as many, and so on."""
CHUNK_TOKENS = 4096
"""`chunk_tokens` where the base file gives neither it nor a number for `tokens_per_tick`."""


def chunk_tokens(spec: BaseSpec) -> int:
    """A number of the base file alone, for results must not depend on what was measured."""
    if spec.chunk_tokens is not None:
        return spec.chunk_tokens
    return CHUNK_TOKENS if spec.tokens_per_tick == "auto" else spec.tokens_per_tick


class Capacity:
    def __init__(self, spec: BaseSpec, ranks: Ranks, bytes_per_parameter: int) -> None:
        self._ranks = ranks
        self._chunk_tokens = chunk_tokens(spec)
        fixed = None if spec.tokens_per_tick == "auto" else spec.tokens_per_tick
        self._knee = Knee(settled=fixed)
        self._ticks = 0
        self._fitted: int | None = None
        """Most tokens a pass may hold by the memory model."""
        self._failed: int | None = None
        """The same, by passes that did not fit."""
        self._mistaken = False
        """Whether a slot did not fit that was thought to."""
        self.memory: MemoryModel | None = None
        self._peaks = Peaks(bytes_per_parameter)
        self._peaks.begin()  # loading a base may take more than holding it
        self._peaks.seen(0, 0)

    @property
    def tokens_per_tick(self) -> int:
        return self._knee.budget

    @property
    def tokens_per_pass(self) -> int:
        """Most padded tokens of a micro-batch of several chunks; a single chunk may have more."""
        bounds = (self._knee.budget, self._fitted, self._failed)
        return max(1, min(bound for bound in bounds if bound is not None))

    @property
    def calibrating(self) -> bool:
        return self._knee.settled is None

    def takes(self, adapter_parameters: int) -> bool:
        """Whether slots of so many parameters in all fit, as far as is known."""
        return self.memory is None or adapter_parameters <= self._room(self.memory)

    def before_tick(self) -> None:
        """Before the passes of a tick, whose peak of memory is measured."""
        self._peaks.begin()

    def after_tick(
        self, tokens: int, largest_pass: int, seconds: float, adapter_parameters: int
    ) -> HostMeasured | None:
        """Collective. What is known now, if this tick changed it."""
        self._ticks += 1
        self._peaks.seen(largest_pass, adapter_parameters)
        settled = self._knee.fills(tokens) and self._measure_speed(tokens, seconds)
        due = self._ticks >= FIRST_REPORT and self._ticks & (self._ticks - 1) == 0
        if not (due or settled or self._mistaken):
            return None
        self._mistaken = False
        return self._measure_memory(adapter_parameters)

    def was_mistaken(self) -> None:
        """A slot did not fit, by the allocator: memory is fitted and told anew after the next tick."""
        self._mistaken = True

    def ran_out(self, tokens: int) -> None:
        """A pass of several chunks with `tokens` in all did not fit: later ones hold half."""
        self._failed = max(1, tokens // 2)

    def _measure_speed(self, tokens: int, seconds: float) -> bool:
        """Rank 0's clock decides. True when the knee has been found."""
        self._knee = self._ranks.broadcast(self._knee.seen(tokens, seconds))
        return self._knee.settled is not None

    def _measure_memory(self, adapter_parameters: int) -> HostMeasured | None:
        machines = self._ranks.gather(socket.gethostname())
        own = self._peaks.fit(limit_bytes(machines.count(socket.gethostname())))
        models = self._ranks.gather(own)
        if any(model is None for model in models):
            return None
        self.memory = worst(models)
        self._fitted = max(self._chunk_tokens, pass_room(self.memory, adapter_parameters))
        return HostMeasured(
            self._knee.budget,
            self.calibrating,
            self.tokens_per_pass,
            self.memory,
            self._room(self.memory),
            self._knee.half,
        )

    def _room(self, memory: MemoryModel) -> int:
        return adapter_room(memory, min(self._chunk_tokens, self._knee.budget))
