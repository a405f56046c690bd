"""`Cluster` on Ray: hosts as gangs of actors, CPU tasks as remote functions.

Owns no status and no queue: Ray gives processes and resources, the store knows what they are for. A gang is
all or nothing: when one of its ranks is lost, all of it is taken down and its residents are queued again.
On a Ray that exists a gang outlives this process, and is found by the next one (`adopt`).
"""

# Ray's types are incomplete; strict mode would have us annotate its unknowns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.cluster import ray_watch
from orchestrator.cluster.gang import (
    ANSWER_SECONDS,
    LAST_WORDS_SECONDS,
    Gang,
    code_digest,
    first_line,
    namespace_of,
    start_gang,
    take_over,
)
from orchestrator.contracts import Capacity, ClusterUnreachable, LivingHost, TaskResult
from workers.actor import Card, run_task
from workers.progress import read_progress
from workers.types import BaseSpec, Command, Event, HostFailed, Progress, Superseded, Task

OBJECT_STORE_BYTES = 80 * 2**20
"""Events are all that travels through Ray; its default would be 30% of the memory."""
SOCKET_FOLDER_BYTES = 40
"""Ray puts unix sockets some 65 bytes below its folder, and Linux allows 107 in all."""


class RayCluster:
    """A Ray of our own on this machine, or (`address`) one that exists.

    Each rank logs to `<home>/logs/hosts/<host>/rank<n>.log`: Ray's own logs go when a Ray of our own ends.
    One's own ends with this process, however that ends. A rank holds one CPU, and a GPU if the cluster has
    any; its threads are an equal share of the CPUs that no rank computes on yet. CPU tasks hold none: on a
    machine whose CPUs are all held by the ranks of a host, a fusion would otherwise wait for the host, and
    the host's next job for the fusion.
    """

    def __init__(self, home: Path, num_cpus: int | None = None, address: str | None = None) -> None:
        """Raises ClusterUnreachable. Call from a thread that lives as long as the cluster is needed."""
        self._logs = home / "logs" / "hosts"
        self._namespace = namespace_of(home)
        self._epoch = 0
        self._progress = (home / "progress").absolute()
        self._gangs: dict[str, Gang] = {}
        self._tasks: dict[str, Any] = {}
        self._watch: subprocess.Popen[bytes] | None = None
        try:
            with _signals_kept():
                if address is None:
                    self._watch = _start_ray(home, num_cpus, self._namespace)
                else:
                    ray.init(address=address, namespace=self._namespace, **_QUIET)
        except (RayError, ConnectionError, RuntimeError, OSError) as error:
            raise ClusterUnreachable(f"Ray does not answer: {error}") from error

    def adopt(self, epoch: int) -> Sequence[LivingHost]:
        self._epoch = epoch
        held = take_over(self._namespace, epoch)
        self._gangs = {gang.card.host: gang for gang, _ in held}
        return [
            LivingHost(card.host, card.base, card.world_size, card.on_gpus, roll)
            for card, roll in ((gang.card, roll) for gang, roll in held)
        ]

    def capacity(self) -> Capacity:
        """What our own gangs leave. Exact at once, where Ray's count of free resources lags behind.

        On a cluster shared with others a gang may find less: it waits, and is given up after ROOM_SECONDS.
        """
        total, held = ray.cluster_resources(), self._held
        return Capacity(max(total.get("CPU", 0.0) - held, 0.0), max(total.get("GPU", 0.0) - held, 0.0))

    @property
    def _held(self) -> int:
        """Ranks of all gangs, a CPU each."""
        return sum(len(gang.ranks) for gang in self._gangs.values())

    def _without_room(self, gang: Gang) -> str | None:
        """Why a gang that waits for its bundles cannot get them.

        A node that dies is counted for seconds, and a gang may have been started on what was left of it: it
        would keep its jobs from the queue until ROOM_SECONDS are over.
        """
        if gang.reserved:
            return None
        total = ray.cluster_resources()
        short = total.get("CPU", 0.0) < self._held or 0.0 < total.get("GPU", 0.0) < self._held
        return f"no room for {len(gang.ranks)} ranks: the cluster has become smaller" if short else None

    def start_host(self, host: str, base: BaseSpec, world_size: int) -> None:
        assert host not in self._gangs, f"host {host} is running already"
        on_gpus = ray.cluster_resources().get("GPU", 0.0) > 0
        threads = self._threads(world_size)
        card = Card(host, base, world_size, on_gpus, threads, self._epoch, code_digest())
        self._gangs[host] = start_gang(card, self._namespace, self._logs / host)

    def _threads(self, world_size: int) -> int:
        """Of each rank: together never more than the cores of a node, as Ray packs a gang if it can."""
        most = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
        taken = sum(len(gang.ranks) * gang.card.threads for gang in self._gangs.values())
        return max(1, int(most - taken) // world_size)

    def send(self, host: str, command: Command) -> None:
        """A host that is gone takes no commands: its HostFailed was or will be polled."""
        if host in self._gangs:
            self._gangs[host].send(command)

    def poll(self, host: str) -> Sequence[Event]:
        gang = self._gangs.get(host)
        if gang is None:
            return ()
        try:
            return self._poll(host, gang)
        except Superseded:
            self._gangs.clear()  # they are another's now, and not ours to close
            raise

    def _poll(self, host: str, gang: Gang) -> list[Event]:
        events = gang.collect(ANSWER_SECONDS)
        told = [event.message for event in events if isinstance(event, HostFailed)]
        failure = gang.failure(wait=bool(told)) or next(iter(told), None) or self._without_room(gang)
        if failure is None:
            return events
        while not told and gang.alive(0) and (more := gang.collect(LAST_WORDS_SECONDS)):
            events += more
        self.stop_host(host)
        # A rank's own HostFailed is only its view, often just "connection closed by peer".
        return [*(event for event in events if not isinstance(event, HostFailed)), HostFailed(failure)]

    def heartbeat(self, host: str) -> int:
        """Rounds the host's loop had done at the last poll; 0 while it loads or once it is gone."""
        return self._gangs[host].rounds if host in self._gangs else 0

    def stop_host(self, host: str) -> None:
        """Takes the processes away at once: what must be kept was saved by Detach before."""
        gang = self._gangs.pop(host, None)
        if gang is not None:
            gang.take_away()

    def submit_task(self, task_id: str, task: Task) -> None:
        if task_id not in self._tasks or self.task_result(task_id) is not None:
            (self._progress / task_id).unlink(missing_ok=True)
            self._tasks[task_id] = run_task.remote(task, str(self._progress / task_id))

    def task_result(self, task_id: str) -> TaskResult | None:
        """Raises KeyError for a task that was never submitted to this cluster."""
        done, _ = ray.wait([self._tasks[task_id]], timeout=0)
        if not done:
            return None
        try:
            return TaskResult(value=ray.get(done[0]))
        except RayTaskError as error:
            return TaskResult.of(error.cause)
        except RayError as error:
            return TaskResult(error=f"the process of the task was lost: {first_line(error)}")

    def task_progress(self, task_id: str) -> Progress | None:
        return read_progress(self._progress / task_id)

    def forget_task(self, task_id: str) -> None:
        self._tasks.pop(task_id, None)
        (self._progress / task_id).unlink(missing_ok=True)

    def close(self) -> None:
        for host in list(self._gangs):
            self.stop_host(host)
        ray.shutdown()
        if self._watch is not None and self._watch.stdin is not None:
            self._watch.stdin.close()
            self._watch.wait()


# ---- Ray itself -----------------------------------------------------------------------------------------


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def _start_ray(home: Path, num_cpus: int | None, namespace: str) -> subprocess.Popen[bytes]:
    """Start a Ray that ends with this process; the watcher that sees to it."""
    _private_token()
    folder = _short_folder(home)
    watch = ray_watch.start(folder)
    os.environ.update(_SETTINGS)
    ray.init(
        namespace=namespace,
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(folder),
        **_QUIET,
    )
    return watch


@contextmanager
def _signals_kept() -> Generator[None]:
    """SIGTERM stays ours: Ray's handler exits while Ray starts, and later prints a stack trace and aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _private_token() -> None:
    """Ray's token lets whoever reads it run code; Ray would write the file readable by all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        path.chmod(0o600)
    else:
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)


def _short_folder(home: Path) -> Path:
    """A fresh private folder for Ray's sockets and logs: under `home` if its path is short enough."""
    parent = home / "ray"
    if len(os.fsencode(parent.resolve())) + len("/12345678") > SOCKET_FOLDER_BYTES:
        return Path(tempfile.mkdtemp(prefix="chorus-"))
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent.resolve()))
