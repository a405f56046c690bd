"""One local Ray for all tests of a session, and the bases and jobs they send to it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.numerics.jobs import test_base as random_base
from tests.numerics.jobs import three_jobs
from workers.types import HostFailed


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="session")
def ray_cluster(ray_home, s3):
    """Its ranks find `s3`: they have the environment in which it was started."""
    # Here, so that the tests of this folder that need no Ray do not import it.
    from orchestrator.cluster.ray_cluster import RayCluster

    cluster = RayCluster(ray_home, num_cpus=2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def jobs(tmp_path):
    """Three jobs of four steps that validate and save as they go."""
    specs = three_jobs(tmp_path, steps=4)
    return [replace(spec, validation=spec.train) for spec in specs]


def poll_until(cluster, host, wanted, seconds=120.0):
    """Events of `host` up to the poll that brought the one wanted; an unwanted HostFailed fails at once."""
    events, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        events += cluster.poll(host)
        if any(wanted(event) for event in events):
            return events
        failed = [event for event in events if isinstance(event, HostFailed)]
        assert not failed, failed
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s; got {events}")


def task_end(cluster, task_id, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = cluster.task_result(task_id)
        if result is not None:
            return result
        time.sleep(0.01)
    raise AssertionError(f"task {task_id} did not end within {seconds} s")
