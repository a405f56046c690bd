"""Two real ranks, started once and kept for every test that needs them: importing torch twice is slow."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from workers.ranks import Ranks, connect

_pair: Pair | None = None


class Pair:
    """Two processes in one gloo group; each runs the same function on the same arguments."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self._inboxes = [context.Queue() for _ in range(2)]
        self._outbox = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, port, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(ranks, *arguments)` on both ranks; rank 0's result. Raises what a rank raised."""
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
    """Run on the session's pair, starting it if there is none. A pair that failed is not used again."""
    global _pair
    if _pair is None:
        _pair = Pair()
        atexit.register(_pair.close)
    try:
        return _pair.call(function, *arguments)
    except BaseException:
        broken, _pair = _pair, None
        broken.close()
        raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, port: int, inbox: Any, outbox: Any) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    ranks: Ranks = connect(rank, 2, "127.0.0.1", port)
    while (request := inbox.get()) is not None:
        function, arguments = request
        try:
            result = function(ranks, *arguments)
        except BaseException as error:
            result = RuntimeError(f"rank {rank}: {error!r}")
        outbox.put((rank, result if rank == 0 or isinstance(result, BaseException) else None))
