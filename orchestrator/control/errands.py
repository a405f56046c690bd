"""What is asked of the registry, each on a thread of its own: a server that hangs keeps no decision waiting.

The controller says what to ask and takes the answer in at a later round; statuses and the store's writes
stay on its own thread. An errand has lanes (a registered name, a series of points), and each lane has one
errand at a time: what is asked of one name is asked in order. Nothing is queued: who finds no way asks again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

AT_ONCE = 4

T = TypeVar("T")
Start: TypeAlias = Callable[[Callable[[], None]], object]
"""Has something done, now or later, here or elsewhere."""


def on_a_thread(work: Callable[[], None]) -> None:
    # A daemon: a server that hangs must not keep the process from ending.
    threading.Thread(target=work, name="registry", daemon=True).start()


@dataclass(frozen=True)
class Errand:
    lanes: Set[str]
    answer: Future[Any]
    heard: Callable[[Future[Any]], bool]


class Errands:
    """Those under way."""

    def __init__(self, start: Start = on_a_thread) -> None:
        self._start = start
        self._under_way: list[Errand] = []
        self._turned_away = False

    def free(self, lanes: Set[str], comes_again: bool = False) -> bool:
        """Whether an errand on these lanes could be begun now; if not, the next answer is told to make way.

        But not for one that comes again by itself.
        """
        taken = (lane for errand in self._under_way for lane in errand.lanes)
        free = len(self._under_way) < AT_ONCE and lanes.isdisjoint(taken)
        self._turned_away |= not free and not comes_again
        return free

    def begin(self, lanes: Set[str], ask: Callable[[], T], heard: Callable[[Future[T]], bool]) -> None:
        """Have `ask` done. `heard` takes its answer, or what it raised, on the controller's thread, and
        tells whether that bears on what to do next."""
        answer: Future[T] = Future()
        self._under_way.append(Errand(lanes, answer, heard))
        self._start(partial(_answer, answer, ask))

    def hear(self) -> bool:
        """Take in every answer there is; whether there is now something to do that there was not."""
        done = [errand for errand in self._under_way if errand.answer.done()]
        if not done:
            return False
        self._under_way = [errand for errand in self._under_way if errand not in done]
        made_way, self._turned_away = self._turned_away, False
        bears = [errand.heard(errand.answer) for errand in done]
        return made_way or any(bears)

    def finish(self, seconds: float) -> None:
        """Take in what is answered within so long. What then is still under way may be done, or not."""
        deadline = time.monotonic() + seconds
        while self._under_way and (left := deadline - time.monotonic()) > 0:
            wait([errand.answer for errand in self._under_way], left, FIRST_COMPLETED)
            self.hear()


def _answer(answer: Future[T], ask: Callable[[], T]) -> None:
    try:
        answer.set_result(ask())
    except BaseException as error:
        answer.set_exception(error)
