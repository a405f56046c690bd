"""A host without its controller: it goes on, whoever comes next holds it, and it ends when nobody comes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from tests.integration.test_cluster_faults import ranks
from workers.hang import ORPHAN_VARIABLE, orphan_seconds
from workers.manifest import verify_folder
from workers.types import BadInput

SECONDS = 60.0
FIRST = """
import pickle, sys, time
from pathlib import Path
from orchestrator.cluster.ray_cluster import RayCluster
from tests.integration.conftest import poll_until
from workers.types import Attach, HostReady, StepDone
home, address, size, base, jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
cluster = RayCluster(home, address=address)
cluster.adopt(1)
cluster.start_host("lonely", base, size)
for job in jobs:
    cluster.send("lonely", Attach(job))
poll_until(cluster, "lonely", lambda event: isinstance(event, StepDone))
print("trains", flush=True)
while True:
    time.sleep(1)
"""


@contextmanager
def first_controller(folder: Path, home: Path, size, base, *jobs):
    """A process that holds a host at which the first job has done a step, and polls no more; then killed."""
    told = folder / "told"
    told.write_bytes(pickle.dumps((home, ray.get_runtime_context().gcs_address, size, base, jobs)))
    process = subprocess.Popen([sys.executable, "-c", FIRST, str(told)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"trains\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_cluster_host_nobody_speaks_to_trains_to_the_end_and_then_gives_its_room_back(
    ray_cluster, ray_home, base, jobs, tmp_path, monkeypatch
):
    monkeypatch.setenv(ORPHAN_VARIABLE, "1")
    with first_controller(tmp_path, ray_home, 1, base, jobs[0]):
        (process,) = ranks()
    process.wait(timeout=SECONDS)
    verify_folder(Path(jobs[0].checkpoint_dir) / "adapter")
    deadline = time.monotonic() + SECONDS
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ray.available_resources().get("CPU") == 2.0
    assert ray_cluster.adopt(5) == []


@pytest.mark.parametrize("text", ["soon", "0", "inf"])
def test_orphan_seconds_that_are_none_are_refused(text):
    with pytest.raises(BadInput, match=ORPHAN_VARIABLE):
        orphan_seconds({ORPHAN_VARIABLE: text})
