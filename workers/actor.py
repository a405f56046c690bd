"""One rank of a host as a Ray actor, and the CPU task. The only `import ray` below the orchestrator.

The loop (`workers.serve`) runs in a thread of its own; the other methods answer at once, in the order they
were called. Nothing heavy is imported before `serve`: the driver imports this file too.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from workers.mail import Mail, Polled
from workers.serve import serve
from workers.types import BaseSpec, Command, Task

Endpoint = tuple[str, int]


class Rank:
    """One rank of a host. A dead one is not restarted: its host is given up as a whole and queued again."""

    def __init__(self, environment: Mapping[str, str], log_file: str) -> None:
        path = Path(log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            filename=path, force=True, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        # Before torch and DeepSpeed are imported: both read theirs when they are, threads among them.
        os.environ.update(environment)
        self.mail = Mail()

    def endpoint(self) -> Endpoint:
        """This node's address and a port that is free on it now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @ray.method(concurrency_group="loop")
    def serve(self, base: BaseSpec, rank: int, *endpoints: Endpoint) -> None:
        """Load the base and serve until Close. `endpoints` are those of all ranks, in rank order.

        Raises whatever ended the host.
        """
        from workers.host import Host
        from workers.ranks import connect

        address, port = endpoints[0]
        if len({node for node, _ in endpoints}) == 1:
            # One machine: stay on its loopback, whatever becomes of its other interfaces.
            address = "127.0.0.1"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks = connect(rank, len(endpoints), address, port)
        for _ in serve(lambda: Host.load(base, ranks), ranks, self.mail):
            pass

    def submit(self, command: Command) -> None:
        self.mail.submit(command)

    def poll(self, after: int) -> Polled:
        return self.mail.poll(after)


RankActor: Any = ray.remote(max_restarts=0, concurrency_groups={"loop": 1})(Rank)


def _run_task(task: Task) -> dict[str, Any]:
    """Run a CPU task in a worker process. Raises BadInput for what a user did wrong."""
    from workers.task import run

    return run(task)


run_task: Any = ray.remote(num_cpus=0, max_retries=0)(_run_task)
