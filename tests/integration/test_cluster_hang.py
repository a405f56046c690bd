"""A rank that stops without dying (SIGSTOP): found by its peers' collectives, or by rank 0 not answering."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import psutil
import pytest

from tests.integration.conftest import poll_until
from tests.integration.test_cluster_faults import ranks
from workers.hang import VARIABLE, hang_seconds
from workers.types import Attach, BadInput, HostFailed, HostReady, StepDone

SECONDS = 4.0


@pytest.mark.parametrize(("size", "stopped"), [(2, 1), (2, 0)])
def test_cluster_rank_stopped_is_found_within_twice_the_timeout_and_taken_away(
    ray_cluster, base, jobs, monkeypatch, size, stopped
):
    monkeypatch.setenv(VARIABLE, f"{SECONDS:g}")
    host = f"stopped-{size}-{stopped}"
    ray_cluster.start_host(host, base, size)
    poll_until(ray_cluster, host, lambda event: isinstance(event, HostReady))
    long = replace(jobs[0], training=replace(jobs[0].training, max_steps=100_000))
    ray_cluster.send(host, Attach(long))
    poll_until(ray_cluster, host, lambda event: isinstance(event, StepDone))
    processes = sorted(ranks(), key=lambda process: process.create_time())
    assert len(processes) == size
    # The older process need not be rank 0: over the two cases each is stopped once.
    processes[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    events = poll_until(ray_cluster, host, lambda event: isinstance(event, HostFailed), 6 * SECONDS)
    found_after = time.monotonic() - began
    print(f"{host}: found after {found_after:.1f} s: {events[-1].message}")
    assert found_after <= 2 * SECONDS
    assert ray_cluster.capacity().cpus == 2.0
    assert psutil.wait_procs(processes, timeout=15.0)[1] == []


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_hang_seconds_that_are_none_are_refused(text):
    with pytest.raises(BadInput, match=VARIABLE):
        hang_seconds({VARIABLE: text})


def test_cluster_that_was_not_polled_for_longer_than_the_timeout_has_lost_no_host(
    ray_cluster, base, monkeypatch
):
    monkeypatch.setenv(VARIABLE, "1")
    ray_cluster.start_host("unheard", base, 1)
    poll_until(ray_cluster, "unheard", lambda event: isinstance(event, HostReady))
    gang = ray_cluster._gangs["unheard"]
    assert gang.answer is not None or ray_cluster.poll("unheard") == []
    gang.answer = gang.answer or gang.ranks[0].poll.remote(gang.after, gang.epoch)
    gang.heard = time.monotonic() - 60.0  # as if the controller had been kept elsewhere for a minute
    assert not [event for event in ray_cluster.poll("unheard") if isinstance(event, HostFailed)]
    ray_cluster.stop_host("unheard")
