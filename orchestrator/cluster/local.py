"""`Cluster` in this process, without Ray: one rank a host, worked a little at every `poll`.

For a laptop, for tests, and where Ray cannot run. Same loop, same events; a tick, an evaluation or a task
blocks the caller while it runs, and a host that takes its process down takes the orchestrator down with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from orchestrator.contracts import Capacity, LivingHost, TaskResult
from workers.host import Host
from workers.mail import Mail
from workers.ranks import Ranks
from workers.serve import serve
from workers.task import run
from workers.types import BadInput, BaseSpec, Command, Event, Progress, Task

WORK_SECONDS = 0.2
"""A poll begins no further round after this long; one round is one tick at most."""

log = logging.getLogger(__name__)


@dataclass
class Served:
    """One host of this process: its mail, and its loop, stopped between two rounds."""

    mail: Mail
    loop: Generator[bool]
    after: int = 0

    def work(self) -> bool:
        """Rounds until the host is idle or WORK_SECONDS are over; False once the loop has ended."""
        deadline = time.monotonic() + WORK_SECONDS
        try:
            while next(self.loop) and time.monotonic() < deadline:
                pass
        except StopIteration:
            return False
        except Exception:
            # The loop has put out HostFailed and logged the traceback.
            return False
        return True

    def events(self) -> tuple[Event, ...]:
        polled = self.mail.poll(self.after)
        self.after = polled.last
        return polled.events


class LocalCluster:
    """Works its hosts on this process's cores, or its first GPU, one after the other."""

    def __init__(self) -> None:
        self._hosts: dict[str, Served] = {}
        self._tasks: dict[str, TaskResult] = {}
        self._progress: dict[str, Progress] = {}

    def adopt(self, epoch: int) -> Sequence[LivingHost]:  # noqa: ARG002
        """Its hosts end with this process: there are none."""
        return ()

    def capacity(self) -> Capacity:
        """Room for one host of one rank: a second would slow the first without gaining anything."""
        free = float(not self._hosts)
        return Capacity(free, free if torch.cuda.is_available() else 0.0)

    def start_host(self, host: str, base: BaseSpec, world_size: int) -> None:
        """The base is loaded by the first `poll`. Raises BadInput for more than one rank."""
        assert host not in self._hosts, f"host {host} is running already"
        if world_size != 1:
            raise BadInput(
                f"world_size is {world_size}, but without Ray a host is one process: set it to 1 or use Ray"
            )
        ranks, mail = Ranks(), Mail()
        self._hosts[host] = Served(mail, serve(lambda: Host.load(base, ranks), ranks, mail, idle_seconds=0.0))

    def send(self, host: str, command: Command) -> None:
        """A host that is gone takes no commands: its HostFailed was polled."""
        if host in self._hosts:
            self._hosts[host].mail.submit(command)

    def poll(self, host: str) -> Sequence[Event]:
        served = self._hosts.get(host)
        if served is None:
            return ()
        if not served.work():
            del self._hosts[host]
        return served.events()

    def stop_host(self, host: str) -> None:
        """Drops the host between two rounds: what must be kept was saved by Detach before."""
        served = self._hosts.pop(host, None)
        if served is not None:
            served.loop.close()

    def submit_task(self, task_id: str, task: Task) -> None:
        """Runs it before returning."""
        try:
            self._tasks[task_id] = TaskResult(value=run(task, partial(self._told, task_id)))
        except Exception as error:
            if not isinstance(error, BadInput):
                log.exception("task %s failed", task_id)
            self._tasks[task_id] = TaskResult.of(error)

    def task_result(self, task_id: str) -> TaskResult | None:
        """Raises KeyError for a task that was never submitted to this cluster."""
        return self._tasks[task_id]

    def task_progress(self, task_id: str) -> Progress | None:
        return self._progress.get(task_id)

    def forget_task(self, task_id: str) -> None:
        self._tasks.pop(task_id, None)
        self._progress.pop(task_id, None)

    def _told(self, task_id: str, done: int, total: int) -> None:
        self._progress[task_id] = Progress(done, total)

    def close(self) -> None:
        for host in list(self._hosts):
            self.stop_host(host)
