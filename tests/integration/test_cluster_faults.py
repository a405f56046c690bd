"""What Ray leaves behind when something dies: nothing, and no one waits for it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from orchestrator.cluster import ray_watch
from orchestrator.cluster.ray_cluster import start_gang
from tests.integration.conftest import poll_until
from workers.types import Attach, HostFailed, HostReady, StepDone

SECONDS = 15.0


def ranks():
    """The rank processes of this session's Ray."""
    family = psutil.Process().children(recursive=True)
    return [
        process
        for process in family
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Rank")
    ]


def test_cluster_rank_killed_loses_the_host_within_seconds_and_gives_room_back(ray_cluster, base, jobs):
    ray_cluster.start_host("killed", base, 2)
    poll_until(ray_cluster, "killed", lambda event: isinstance(event, HostReady))
    long = replace(jobs[0], training=replace(jobs[0].training, max_steps=100_000))
    ray_cluster.send("killed", Attach(long))
    poll_until(ray_cluster, "killed", lambda event: isinstance(event, StepDone))
    beats, processes = ray_cluster.heartbeat("killed"), ranks()
    assert beats > 0
    assert len(processes) == 2
    processes[1].send_signal(signal.SIGKILL)
    events = poll_until(ray_cluster, "killed", lambda event: isinstance(event, HostFailed), SECONDS)
    assert [event for event in events if isinstance(event, HostFailed)] == [events[-1]]
    assert "died" in events[-1].message
    assert ray_cluster.poll("killed") == ()
    assert ray_cluster.capacity().cpus == 2.0
    assert psutil.wait_procs(processes, timeout=SECONDS)[1] == []


def test_cluster_base_that_is_no_model_fails_with_the_users_sentence_and_gives_room_back(
    ray_cluster, ray_home, base
):
    ray_cluster.start_host("wrong", replace(base, path="nowhere"), 1)
    (failed,) = poll_until(ray_cluster, "wrong", lambda event: isinstance(event, HostFailed))
    assert failed.message.startswith("base_model: nowhere has no config.json")
    (log,) = ray_home.glob("logs/hosts/wrong/*.log")
    assert "Traceback" in log.read_text()
    assert ray_cluster.capacity().cpus == 2.0


def test_cluster_that_shrank_below_what_was_asked_of_it_gives_up_the_gang_that_found_no_room(
    ray_cluster, base
):
    """As when a node dies that was still counted when the host was started on it."""
    ray_cluster.start_host("seated", base, 2)
    poll_until(ray_cluster, "seated", lambda event: isinstance(event, HostReady))
    ray_cluster.start_host("crowded", base, 2)
    (failed,) = poll_until(ray_cluster, "crowded", lambda event: isinstance(event, HostFailed), SECONDS)
    assert failed.message.startswith("no room for 2 ranks")
    assert ray_cluster.poll("seated") == []
    ray_cluster.stop_host("seated")
    assert ray_cluster.capacity().cpus == 2.0


def test_cluster_token_is_readable_by_its_owner_alone(ray_cluster):
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


DRIVER = """
import sys
from pathlib import Path
from orchestrator.cluster.ray_cluster import RayCluster
from workers.types import BaseSpec
cluster = RayCluster(Path(sys.argv[1]), num_cpus=2)
cluster.start_host("host", BaseSpec(sys.argv[2]), 2)
print("up", flush=True)
sys.stdin.read()
"""


def test_cluster_driver_killed_leaves_no_process_and_no_folder(base, tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), base.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert driver.stdout.readline() == b"up\n"
    family = psutil.Process(driver.pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in family)
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs(family, timeout=SECONDS)[1] == []


def test_ray_watch_driver_gone_kills_writers_below_its_folder_and_spares_readers(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    sleeper = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]

    def start(stdout, **options):
        return subprocess.Popen(sleeper, stdin=subprocess.PIPE, stdout=stdout, **options)

    with (mine / "log").open("w") as log, (other / "log").open("w") as spared:
        writer, stranger = start(log), start(spared)
    with (mine / "log").open() as log:
        reader = start(subprocess.DEVNULL, stderr=log)
    watch = ray_watch.start(mine)
    watch.stdin.close()
    assert watch.wait(timeout=SECONDS) == 0
    assert writer.wait(timeout=SECONDS) == -signal.SIGKILL
    assert (stranger.poll(), reader.poll()) == (None, None)
    assert not mine.exists()
    for process in (writer, stranger, reader):
        process.kill()
        process.communicate()


def threads_of_rank(rank):
    """How many threads torch computes with in a rank, and how they wait."""

    def asked(_):
        import torch

        return torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"]

    return ray.get(rank.__ray_call__.remote(asked), timeout=60)


def test_cluster_ranks_share_the_cores_in_threads_that_sleep_when_idle(ray_cluster, base, monkeypatch):
    gangs = []

    def start(*arguments):
        gangs.append(start_gang(*arguments))
        return gangs[-1]

    monkeypatch.setattr("orchestrator.cluster.ray_cluster.start_gang", start)
    for name in ("alone", "beside"):
        ray_cluster.start_host(name, base, 1)
        poll_until(ray_cluster, name, lambda event: isinstance(event, HostReady))
    found = [threads_of_rank(gang.ranks[0]) for gang in gangs]
    for name in ("alone", "beside"):
        ray_cluster.stop_host(name)
    assert found == [(2, "PASSIVE"), (1, "PASSIVE")]
