"""Real ranks in processes of their own, started once and kept for every test: importing torch is slow.

One rank has a process of its own too when it uses DeepSpeed, which leaves its mark on whatever loads a model
in the same process.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing import parent_process
from typing import Any

import torch
import torch.multiprocessing as mp

from workers.ranks import Ranks, connect

_groups: dict[int, Group] = {}


class Group:
    """A host's processes; each runs the same function on the same arguments."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self._inboxes = [context.Queue() for _ in range(size)]
        self._outbox = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, size, port, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(ranks, *arguments)` on every rank; rank 0's result. Raises what a rank raised."""
        for inbox in self._inboxes:
            inbox.put((function, arguments))
        results = dict(self._outbox.get(timeout=240) for _ in self._inboxes)
        for result in results.values():
            if isinstance(result, BaseException):
                raise result
        return results[0]

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


def two_ranks(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run on the session's pair of ranks, starting it if there is none."""
    return _call(2, function, arguments)


def one_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run on the session's lone rank, which is in no process group unless DeepSpeed makes one."""
    return _call(1, function, arguments)


def _call(size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A group that failed is not used again."""
    if size not in _groups:
        _groups[size] = Group(size)
        atexit.register(_groups[size].close)
    try:
        return _groups[size].call(function, *arguments)
    except BaseException:
        _groups.pop(size).close()
        raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, size: int, port: int, inbox: Any, outbox: Any) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    ranks = connect(rank, size, "127.0.0.1", port) if size > 1 else Ranks()
    while (request := inbox.get()) is not None:
        function, arguments = request
        try:
            result = function(ranks, *arguments)
        except BaseException as error:
            result = RuntimeError(f"rank {rank}: {error!r}")
        outbox.put((rank, result if rank == 0 or isinstance(result, BaseException) else None))


def _leave_with_parent() -> None:
    """A test process that is killed, as pytest-xdist kills one that is slow to end, closes no group."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
