"""Raylets killed under two hosts at once, and Ray's head killed and brought back, under a controller at work.

Two placement groups that each lose a node may each keep one bundle and wait for ever for a second (Ray issue
65147): four nodes of a CPU, two hosts of two ranks, and the two raylets that go are of different hosts. What
is left holds one host: one must run again, the other wait in our queue, holding nothing.

The head is its server of state (`gcs_server`), killed with SIGKILL and started again on the same port, with
`RAY_gcs_storage=rocksdb`: the ranks keep their processes and go on, and the controller hears them again.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from orchestrator.job import Reason, Status
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.raylets import Watched, World, job, make_files, ranks, raylets
from workers.types import HostFailed, StepDone

PATIENCE = 240.0
AWAY = (0.0, 5.0, 20.0)
"""Seconds the head stays away, by turns: Ray's nodes wait 60 s for it."""
JOBS = (("finance", "left"), ("support", "right"))


@dataclass(frozen=True)
class Lost:
    settled: float
    """Seconds from the kills until each job stepped again or waited in the queue, its host taken away."""
    stepping: int
    waiting: int


@dataclass(frozen=True)
class Head:
    away: float
    back: float
    """Seconds from the head's return until the controller had heard a new step of every job."""
    same_processes: bool
    steps_lost: int


def case(folder: Path, small: bool, seed: int) -> Outcome:
    chance, began = random.Random(seed), time.monotonic()
    times, aways = (1, AWAY[:1]) if small else (5, AWAY)
    with tracking_server.start(folder / "mlflow") as server:
        registry = MlflowRegistry(server.url)
        heads = lose_head(folder / "head", registry, aways)
        losses = [lose_nodes(folder / f"nodes-{turn}", registry, chance) for turn in range(times)]
    return outcome(heads, losses, time.monotonic() - began, seed)


def world_of(folder: Path, nodes: Any, registry: Any) -> World:
    """Two jobs that will not end by themselves, each on a base of its own, so on a host of its own."""
    jobs = [job(name, base, 100_000, seed=number) for number, (name, base) in enumerate(JOBS)]
    world = World(
        make_files(folder, dict.fromkeys(("left", "right"), 2)),
        Watched(folder, nodes.address),
        registry,
        jobs,
    )
    world.tick_until(lambda: len(stepped(world.cluster, 0)) == len(JOBS), PATIENCE)
    return world


def stepped(cluster: Watched, since: int) -> dict[str, int]:
    """Job -> its newest step among the reports from that one on."""
    return {event.job: event.step for _, _, event in cluster.heard[since:] if isinstance(event, StepDone)}


# ---- raylets ------------------------------------------------------------------------------------------


def lose_nodes(folder: Path, registry: Any, chance: random.Random) -> Lost:
    with raylets(folder / "ray", nodes=4) as nodes:
        world = world_of(folder, nodes, registry)
        before = len(world.cluster.heard)
        for node in one_node_of_each(world.cluster, nodes, chance):
            nodes.remove_node(node, allow_graceful=False)
        struck = time.monotonic()
        world.tick_until(lambda: settled(world, before), PATIENCE)
        took = time.monotonic() - struck
        stepping = sum(job.status is Status.RUNNING for job in world.store.jobs())
        waiting = sum(job.status is Status.WAITING for job in world.store.jobs())
        world.controller.close()
        world.cluster.close()
    return Lost(took, stepping, waiting)


def one_node_of_each(cluster: Watched, nodes: Any, chance: random.Random) -> list[Any]:
    """A raylet under each host."""
    by_id = {node.node_id: node for node in nodes.worker_nodes}
    return [by_id[chance.choice(sorted(cluster.nodes_of(host)))] for host in cluster.hosts()]


def settled(world: World, since: int) -> bool:
    """Both hosts were known to be lost, and each job steps again or waits in the queue for a host."""
    events = world.cluster.heard[since:]
    lost = [place for place, (_, _, event) in enumerate(events) if isinstance(event, HostFailed)]
    if len(lost) < len(JOBS):
        return False
    again = stepped(world.cluster, since + lost[-1])
    # Who waits, waits because the other holds the room, so that one must be at work.
    return bool(again) and all(
        job.id in again or (job.status is Status.WAITING and job.reason is not Reason.HOST_LOST)
        for job in world.store.jobs()
    )


# ---- the head -----------------------------------------------------------------------------------------


def lose_head(folder: Path, registry: Any, aways: tuple[float, ...]) -> list[Head]:
    folder.mkdir(parents=True)
    kept = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "rocksdb")}
    with (
        patch.dict(os.environ, kept),
        raylets(folder / "ray", nodes=4, gcs_server_port=free_port()) as nodes,
    ):
        world = world_of(folder, nodes, registry)
        (started,) = nodes.head_node.all_processes["gcs_server"]
        gcs, heads = psutil.Process(started.process.pid), list[Head]()
        for away in aways:
            gcs, head = lose_head_once(world, gcs, away)
            heads.append(head)
        world.controller.close()
        world.cluster.close()
        gcs.kill()
    return heads


def lose_head_once(world: World, gcs: psutil.Process, away: float) -> tuple[psutil.Process, Head]:
    """The process that took its place, and how it went."""
    processes = {process.pid for process in ranks()}
    before = stepped(world.cluster, 0)
    mark = len(world.cluster.heard)
    again, environment = gcs.cmdline(), gcs.environ()
    gcs.kill()
    gcs.wait()
    returns = time.monotonic() + away
    # By a process, as a supervisor would: a call to Ray waits for the head meanwhile, and holds the GIL.
    command = ["sh", "-c", f'sleep {away}; exec "$@"', "sh", *again]
    heir = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def back() -> bool:
        late = [place for place, (at, _, _) in enumerate(world.cluster.heard) if at > returns]
        return bool(late) and len(stepped(world.cluster, late[0])) == len(JOBS)

    world.tick_until(back, away + PATIENCE)
    took = time.monotonic() - returns
    found = world.cluster.heard[mark:]
    lost = sum(step_gaps(before[job.id], job.id, found) for job in world.store.jobs())
    same = {process.pid for process in ranks()} == processes
    return heir, Head(away, took, same, lost)


def step_gaps(last: int, job: str, found: list[Any]) -> int:
    """Steps of a job that did not come exactly one after another."""
    steps = [event.step for _, _, event in found if isinstance(event, StepDone) and event.job == job]
    return sum(step != last + number for number, step in enumerate(steps, start=1))


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def outcome(heads: list[Head], losses: list[Lost], seconds: float, seed: int) -> Outcome:
    return Outcome(
        "chaos-nodes",
        f"Two raylets killed {len(losses)} times; the head killed {len(heads)} times",
        [
            Table(
                "Two raylets under two hosts",
                ("settled after (s)", "jobs stepping", "jobs queued"),
                [(f"{lost.settled:.1f}", lost.stepping, lost.waiting) for lost in losses],
            ),
            Table(
                "The head",
                ("away (s)", "steps heard again after its return (s)", "same processes", "steps lost"),
                [
                    (f"{head.away:.0f}", f"{head.back:.1f}", head.same_processes, head.steps_lost)
                    for head in heads
                ],
            ),
        ],
        [
            Target(
                "most seconds until both hosts run or are queued",
                max(x.settled for x in losses),
                30,
                at_least=False,
            ),
            Target("most seconds until control is back", max(x.back for x in heads), 30, at_least=False),
            Target(
                "head kills after which a rank was another process",
                sum(not x.same_processes for x in heads),
                0,
                at_least=False,
            ),
            Target(
                "steps lost or doubled over a head kill", sum(x.steps_lost for x in heads), 0, at_least=False
            ),
        ],
        Bars({f"raylets {n + 1}": lost.settled for n, lost in enumerate(losses)}, "seconds until settled"),
        [
            "Control is back when the controller has heard a new step of every job. "
            f"It took {seconds:.0f} s; seed {seed}."
        ],
    )
