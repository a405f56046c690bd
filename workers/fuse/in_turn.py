"""Several modules at once, a thread each: memory holds as many as there are threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from workers.fuse.normal import Module

Result = TypeVar("Result")


def in_turn(modules: Iterable[Module], work: Callable[[Module], Result], threads: int) -> Iterator[Result]:
    """`work` of every module. Each works with one thread of torch's own: its digits do not change."""
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        for module in modules:
            waiting.append(pool.submit(work, module))
            if len(waiting) >= threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
