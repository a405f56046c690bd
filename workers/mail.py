"""The mailbox of a host: commands in, numbered events out, and who may speak to it. Standard library only.

Events are kept until a poll says that they were taken in, so a controller that dies loses none: the next one
takes the host over (`Roll`) as it was after the last event that was taken in, and polls from there. What the
dead one had taken in but not said so comes again: whoever hears it must be able to hear it twice.

Controllers are numbered, by their store: their *epoch*. Once a host has heard of a higher one, the mail of a
lower one is refused, as from a controller that was stopped and went on after another had taken its place.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from workers.types import (
    Attach,
    Command,
    Detached,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    Event,
    HostMeasured,
    HostReady,
    JobSpec,
    JobStopped,
    Roll,
    SearchDone,
    SearchWeights,
    Superseded,
    TrainingFinished,
)

MOST_EVENTS = 5_000
"""In one answer: a host that was alone for a night has more."""


@dataclass(frozen=True)
class Polled:
    """The next events after the number the caller gave; `last` is the number to give next."""

    events: tuple[Event, ...]
    last: int
    rounds: int
    """Rounds the loop has done. One that stays put while the host is busy tells of a hang."""


class Mail:
    """Commands in and events out of one host, safe between threads. Only rank 0's is used."""

    def __init__(
        self,
        epoch: int = 0,
        orphan_seconds: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epoch` is that of the controller that starts the host; see `abandoned` for `orphan_seconds`."""
        self.epoch = epoch
        self.rounds = 0
        self._orphan_seconds = orphan_seconds
        self._clock = clock
        self._heard = clock()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: deque[tuple[int, Event]] = deque()
        self._last = 0
        self._lock = threading.Lock()
        self._ready: HostReady | None = None
        self._measured: HostMeasured | None = None
        self._attached: dict[str, JobSpec] = {}
        self._requests: dict[str, Evaluate | SearchWeights] = {}

    # ---- the controller's side ---------------------------------------------------------------------------

    def submit(self, command: Command, epoch: int = 0) -> None:
        """Raises Superseded, as do `poll` and `take_over`."""
        with self._lock:
            self._admit(epoch)
            match command:
                case Attach(job):
                    self._attached[job.job] = job
                case Evaluate() | SearchWeights():
                    self._requests[command.request] = command
                case _:
                    pass
            self._commands.put(command)

    def poll(self, after: int, epoch: int = 0) -> Polled:
        """The next events above number `after`, in order; those up to it were taken in and are forgotten."""
        with self._lock:
            self._admit(epoch)
            while self._events and self._events[0][0] <= after:
                self._taken_in(self._events.popleft()[1])
            told = tuple(islice(self._events, MOST_EVENTS))
            last = told[-1][0] if told else self._last
            return Polled(tuple(event for _, event in told), last, self.rounds)

    def take_over(self, epoch: int) -> Roll:
        """Be spoken to by the controller of that epoch from now on, and by no earlier one."""
        with self._lock:
            self._admit(epoch)
            self.epoch = epoch
            after = self._events[0][0] - 1 if self._events else self._last
            asked = tuple(self._attached.values()), tuple(self._requests.values())
            return Roll(after, self._ready, self._measured, *asked)

    # ---- the host's side ---------------------------------------------------------------------------------

    def commands(self, wait: float) -> list[Command]:
        """All commands that came, in order; waits up to `wait` seconds for the first."""
        taken: list[Command] = []
        try:
            taken.append(self._commands.get(block=wait > 0, timeout=wait or None))
            while True:
                taken.append(self._commands.get_nowait())
        except queue.Empty:
            return taken

    def put(self, events: Sequence[Event]) -> None:
        with self._lock:
            for event in events:
                self._last += 1
                self._events.append((self._last, event))

    @property
    def abandoned(self) -> bool:
        """Whether no controller has spoken for `orphan_seconds`."""
        return self._clock() - self._heard > self._orphan_seconds

    def wait_anew(self) -> None:
        """Give a controller the whole time again, to learn what has just happened."""
        self._heard = self._clock()

    # ---- under the lock ----------------------------------------------------------------------------------

    def _admit(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Superseded(f"controller {self.epoch} has taken over from controller {epoch}")
        self._heard = self._clock()

    def _taken_in(self, event: Event) -> None:
        """What the event answers is asked no more."""
        match event:
            case HostReady():
                self._ready = event
            case HostMeasured():
                self._measured = event
            case TrainingFinished() | Detached() | JobStopped():
                held = self._attached.get(event.job)
                if held is not None and held.attempt == event.attempt:
                    del self._attached[event.job]
            case EvaluationDone() | SearchDone() | EvaluationFailed():
                self._requests.pop(event.request, None)
            case _:
                pass
