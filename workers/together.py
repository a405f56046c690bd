"""What all ranks do or none, and what rank 0 writes for all: an expected failure is a value everywhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from workers.disk import Problem, written
from workers.hang import round_seconds
from workers.manifest import CorruptFolder
from workers.memory import is_out_of_memory
from workers.ranks import Ranks
from workers.types import BadInput

T = TypeVar("T")


def on_all(ranks: Ranks, act: Callable[[], T]) -> tuple[T, None] | tuple[None, Problem]:
    """`act` on every rank. If it refuses on one it counts as refused on all, with the first problem.

    Where it is collective itself it must refuse on all ranks alike, or those that go on wait for the others.
    """
    value: T | None = None
    problem: Problem | None = None
    try:
        value = act()
    except Exception as error:
        problem = _problem(error)
        if problem is None:
            raise
    problems = [other for other in ranks.gather(problem) if other]
    if problems:
        return None, problems[0]
    assert value is not None, "what refuses nowhere gives a value everywhere"
    return value, None


def _problem(error: Exception) -> Problem | None:
    """An expected failure as a value."""
    if is_out_of_memory(error):
        return "out_of_memory", next(iter(str(error).strip().splitlines()), "out of memory")
    if isinstance(error, BadInput | CorruptFolder | OSError):
        return "bad_data", str(error) or type(error).__name__
    return None


def on_first(ranks: Ranks, write: Callable[[], object]) -> Problem | None:
    """Let rank 0 write; every rank learns how it went."""
    return ranks.broadcast(written(write) if ranks.rank == 0 else None)


def on_first_at_length(ranks: Ranks, act: Callable[[], T]) -> tuple[T, None] | tuple[None, Problem]:
    """`act` on rank 0 alone, however long it takes; every rank has its value, or why there is none."""
    with ThreadPoolExecutor(1, "rank 0") as thread:
        outcome = thread.submit(act) if ranks.rank == 0 else None
        while ranks.broadcast(bool(outcome and wait([outcome], round_seconds()).not_done)):
            pass
    _, problem = on_all(ranks, lambda: outcome.result() if outcome else True)
    if problem:
        return None, problem
    return ranks.broadcast(outcome.result() if outcome else None), None
