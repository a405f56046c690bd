"""One rank of a host as a Ray actor, and the CPU task. The only `import ray` below the orchestrator.

The actor is detached: it outlives the controller that started it, and one that comes later finds it by its
name. So the loop (`workers.serve`) runs in a thread of the actor's own, not in a call that some controller
waits for; every method answers at once but `ended`. Nothing heavy is imported before the loop begins: the
driver imports this file too.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group, remove_placement_group

from workers.hang import orphan_seconds
from workers.mail import Mail, Polled
from workers.serve import serve
from workers.types import BaseSpec, Command, Roll, Superseded, Task

Endpoint = tuple[str, int]
LOOK_SECONDS = 1.0
"""How often a rank looks whether it is still wanted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """What a host was started with: enough for another controller to take it over."""

    host: str
    base: BaseSpec
    world_size: int
    on_gpus: bool
    threads: int
    """Of each rank."""
    epoch: int
    """Of the controller that started it: two hosts of one name are told apart by it."""
    code: str
    """Digest of this package as it was: the ranks go on with what they have imported."""


class Rank:
    """One rank of a host. A dead one is not restarted: its host is given up as a whole and queued again."""

    def __init__(self, card: Card, rank: int, environment: Mapping[str, str], log_file: str) -> None:
        path = Path(log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            filename=path, force=True, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        # Before torch and DeepSpeed are imported: both read theirs when they are, threads among them.
        os.environ.update(environment)
        self._card, self._rank = card, rank
        self._reserved = socket.socket()
        self._group = get_current_placement_group()
        self._loop: threading.Thread | None = None
        self._error: Exception | None = None
        self.mail = Mail(card.epoch, orphan_seconds())
        threading.Thread(target=self._give_up, daemon=True).start()

    def endpoint(self) -> Endpoint:
        """This node's address and a port of its own, which no other host on it can choose.

        Bound and never listened on: with SO_REUSEADDR on both, torch's store can bind it as well.
        """
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("", 0))
        return ray.util.get_node_ip_address(), self._reserved.getsockname()[1]

    def begin(self, *endpoints: Endpoint) -> None:
        """Load the base and serve until Close. `endpoints` are those of all ranks, in rank order."""
        loop = threading.Thread(target=self._serve, args=(endpoints,), daemon=True)
        loop.start()
        self._loop = loop  # only now: one that is not alive has ended

    @ray.method(concurrency_group="end")
    def ended(self, epoch: int) -> None:
        """Returns when the loop has ended, or raises what ended it.

        Raises Superseded when a later controller comes, so that those who have gone leave no one waiting.
        """
        while self._loop is None or self._loop.is_alive():
            if self.mail.epoch > epoch:
                raise Superseded(self.mail.epoch, epoch)
            if self._loop is None:
                time.sleep(LOOK_SECONDS)
            else:
                self._loop.join(LOOK_SECONDS)
        if self._error is not None:
            raise self._error

    # ---- of rank 0 ---------------------------------------------------------------------------------------

    def submit(self, command: Command, epoch: int) -> None:
        with suppress(Superseded):  # nobody waits for the answer: it is told at the next poll
            self.mail.submit(command, epoch)

    def poll(self, after: int, epoch: int) -> Polled:
        return self.mail.poll(after, epoch)

    # ---- of all ranks ------------------------------------------------------------------------------------

    def take_over(self, epoch: int) -> tuple[Card, Roll] | None:
        """Obey that controller from now on; None from a rank that was never told to begin."""
        roll = self.mail.take_over(epoch)
        return (self._card, roll) if self._loop is not None else None

    def obeys(self, epoch: int) -> bool:
        """Whether no later controller has taken over."""
        return self.mail.epoch <= epoch

    # ---- threads of its own ------------------------------------------------------------------------------

    def _serve(self, endpoints: tuple[Endpoint, ...]) -> None:
        try:
            self._load_and_serve(endpoints)
        except Exception as error:
            log.exception("rank %d: the loop ended", self._rank)
            self._error = error
            self.mail.wait_anew()

    def _load_and_serve(self, endpoints: tuple[Endpoint, ...]) -> None:
        gc.disable()  # what is imported stays: to look through it for garbage takes a fifth of the time
        from workers.host import Host
        from workers.ranks import connect

        def load() -> Host:
            try:
                return Host.load(self._card.base, ranks)
            finally:
                gc.enable()

        address, port = endpoints[0]
        if len({node for node, _ in endpoints}) == 1:
            # One machine: stay on its loopback, whatever becomes of its other interfaces.
            address = "127.0.0.1"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks = connect(self._rank, len(endpoints), address, port)
        for _ in serve(load, ranks, self.mail):
            pass

    def _give_up(self) -> None:
        """End the whole host, this process with it, once its loop does not run and no controller speaks.

        The loop of an abandoned host ends by itself when it has nothing left to do (`workers.serve`).
        """
        while (self._loop is not None and self._loop.is_alive()) or not self.mail.abandoned:
            time.sleep(LOOK_SECONDS)
        log.warning("no controller has spoken to %s for long: it ends", self._card.host)
        while True:
            with suppress(RayError):  # Ray's head may be away just now
                remove_placement_group(self._group)
            time.sleep(LOOK_SECONDS)


RankActor: Any = ray.remote(max_restarts=0, concurrency_groups={"end": 4})(Rank)


def _run_task(task: Task, progress_file: str) -> dict[str, Any]:
    """Run a CPU task in a worker process, which tells its progress in a file that the cluster's nodes share.

    Raises BadInput for what a user did wrong.
    """
    from workers.progress import ProgressFile
    from workers.task import run

    return run(task, ProgressFile(Path(progress_file)))


run_task: Any = ray.remote(num_cpus=0, max_retries=0)(_run_task)
