"""`Cluster` on Ray: hosts as gangs of actors, CPU tasks as remote functions. The only `import ray` here.

Owns no status and no queue: Ray gives processes and resources, the store knows what they are for. A gang is
all or nothing: when one of its ranks is lost, all of it is taken down and its residents are queued again.
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
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster import ray_watch
from orchestrator.contracts import Capacity, ClusterUnreachable, TaskResult
from workers.actor import RankActor, run_task
from workers.hang import DEFAULT, VARIABLE, hang_seconds
from workers.mail import Polled
from workers.serve import failure_words
from workers.types import BaseSpec, Command, Event, HostFailed, Task

ANSWER_SECONDS = 0.2
"""Longest wait for an actor's answer in one `poll`; a later poll picks up a late one. Usually 2 ms."""
LAST_WORDS_SECONDS = 1.0
"""Once a rank has ended: for the others to end, and for the events rank 0 still holds."""
ROOM_SECONDS = 60.0
"""A gang that got no room by then is given up, so that the queue decides again."""
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
        self._gangs: dict[str, Gang] = {}
        self._tasks: dict[str, Any] = {}
        self._watch: subprocess.Popen[bytes] | None = None
        try:
            with _signals_kept():
                if address is None:
                    self._watch = _start_ray(home, num_cpus)
                else:
                    ray.init(address=address, **_QUIET)
        except (RayError, ConnectionError, RuntimeError, OSError) as error:
            raise ClusterUnreachable(f"Ray does not answer: {error}") from error

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
        self._gangs[host] = start_gang(base, world_size, on_gpus, threads, self._logs / host)

    def _threads(self, world_size: int) -> int:
        """Of each rank: together never more than the cores of a node, as Ray packs a gang if it can."""
        most = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
        taken = sum(len(gang.ranks) * gang.threads for gang in self._gangs.values())
        return max(1, int(most - taken) // world_size)

    def send(self, host: str, command: Command) -> None:
        """A host that is gone takes no commands: its HostFailed was or will be polled."""
        if host in self._gangs:
            self._gangs[host].ranks[0].submit.remote(command)

    def poll(self, host: str) -> Sequence[Event]:
        gang = self._gangs.get(host)
        if gang is None:
            return ()
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
            for rank in gang.ranks:
                ray.kill(rank)
            remove_placement_group(gang.group)

    def submit_task(self, task_id: str, task: Task) -> None:
        if task_id not in self._tasks or self.task_result(task_id) is not None:
            self._tasks[task_id] = run_task.remote(task)

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
            return TaskResult(error=f"the process of the task was lost: {_first_line(error)}")

    def close(self) -> None:
        for host in list(self._gangs):
            self.stop_host(host)
        ray.shutdown()
        if self._watch is not None and self._watch.stdin is not None:
            self._watch.stdin.close()
            self._watch.wait()


# ---- a gang: the ranks of one host ----------------------------------------------------------------------


@dataclass
class Gang:
    """The actors of one host, in rank order, in one placement group."""

    group: Any
    ranks: list[Any]
    runs: list[Any]
    """One reference a rank to its `serve`: it is done only when that rank has ended."""
    endpoints: list[Any]
    threads: int
    """Of each rank."""
    started: float = field(default_factory=time.monotonic)
    after: int = 0
    rounds: int = 0
    answer: Any = None
    """The call to rank 0's `poll` that is under way."""
    heard: float | None = None
    """When rank 0 last answered; None before it was first asked."""
    hang_seconds: float = DEFAULT

    def collect(self, seconds: float) -> list[Event]:
        """Rank 0's next events. A lost answer is asked for again with the same number: none is doubled."""
        if self.answer is None:
            self.answer = self.ranks[0].poll.remote(self.after)
            self.heard = time.monotonic() if self._placed() else None
        done, _ = ray.wait([self.answer], timeout=seconds if self._placed() else 0)
        if not done:
            return []
        # Now, however long ago it was asked: the controller may have been kept elsewhere.
        self.answer, self.heard = None, time.monotonic()
        try:
            polled: Polled = ray.get(done[0])
        except RayError:
            return []
        self.after, self.rounds = polled.last, polled.rounds
        return list(polled.events)

    def failure(self, wait: bool) -> str | None:
        """Why the gang is lost; None while all its ranks serve. `wait` a moment if one is about to end."""
        if ray.wait(self.runs, timeout=LAST_WORDS_SECONDS if wait else 0)[0]:
            # The first to end is often one that merely lost its connection to the one that died.
            ended, _ = ray.wait(self.runs, num_returns=len(self.runs), timeout=LAST_WORDS_SECONDS)
            words = [_ended_words(rank, run) for rank, run in enumerate(self.runs) if run in ended]
            return sorted(words, key=lambda text: "onnection" in text)[0]
        if self.heard is not None and time.monotonic() - self.heard > self.hang_seconds:
            return f"rank 0 has not answered for {self.hang_seconds:.0f} s"
        if self.reserved or time.monotonic() - self.started < ROOM_SECONDS:
            return None
        return f"no room for {len(self.ranks)} ranks in the cluster within {ROOM_SECONDS:.0f} s"

    @property
    def reserved(self) -> bool:
        """Whether all its bundles have their place."""
        return self._placed() or self.group.wait(0)

    def alive(self, rank: int) -> bool:
        """False once the rank's process is known to be dead; it may outlive its `serve`."""
        ended, _ = ray.wait([self.runs[rank]], timeout=0)
        try:
            ray.get(ended)
        except RayTaskError:
            return True
        except RayError:
            return False
        return True

    def _placed(self) -> bool:
        done, _ = ray.wait(self.endpoints, num_returns=len(self.endpoints), timeout=0)
        return len(done) == len(self.endpoints)


def start_gang(base: BaseSpec, world_size: int, on_gpus: bool, threads: int, logs: Path) -> Gang:
    """Reserve a bundle for each rank and start it there. Returns at once: Ray places them when it can."""
    resources = {"CPU": 1.0, "GPU": 1.0} if on_gpus else {"CPU": 1.0}
    group = placement_group([resources] * world_size, strategy="PACK")
    ranks = [
        RankActor.options(
            num_cpus=1,
            num_gpus=int(on_gpus),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote(_rank_environment(on_gpus, threads), str(logs / f"rank{index}.log"))
        for index in range(world_size)
    ]
    endpoints = [rank.endpoint.remote() for rank in ranks]
    runs = [rank.serve.remote(base, index, *endpoints) for index, rank in enumerate(ranks)]
    return Gang(group, ranks, runs, endpoints, threads, hang_seconds=hang_seconds())


def _rank_environment(on_gpus: bool, threads: int) -> dict[str, str]:
    """What a rank sets before it imports torch.

    Ray shows a rank its own GPU alone, so its index among the visible ones is always 0. A thread that waits
    must sleep: one that spins takes the core from the thread, or the process, that it waits for.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "LOCAL_RANK": "0"}
    environment |= {VARIABLE: f"{hang_seconds():g}"}
    return environment if on_gpus else {**environment, "DS_ACCELERATOR": "cpu"}


def _ended_words(rank: int, run: Any) -> str:
    try:
        ray.get(run)
    except RayTaskError as error:
        return failure_words(rank, error.cause)
    except RayActorError as error:
        return f"rank {rank} died: {_first_line(error)}"
    except RayError as error:
        return failure_words(rank, error)
    return f"rank {rank} left the host"


# ---- Ray itself -----------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


_QUIET: dict[str, Any] = {"namespace": "chorus", "log_to_driver": False, "logging_level": "ERROR"}
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def _start_ray(home: Path, num_cpus: int | None) -> subprocess.Popen[bytes]:
    """Start a Ray that ends with this process; the watcher that sees to it."""
    _private_token()
    folder = _short_folder(home)
    watch = ray_watch.start(folder)
    os.environ.update(_SETTINGS)
    ray.init(
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
