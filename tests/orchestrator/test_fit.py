"""What is said of a job when it is submitted: its size, its share of a warm host, or why it can never run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.contracts import Capacity
from orchestrator.fit import Ask, fit
from orchestrator.host_view import HostView, Resident
from orchestrator.scheduler import Snapshot
from tests.orchestrator.cli_world import CliWorld
from tests.orchestrator.fakes import FakeCluster
from tests.orchestrator.recipe_files import write_yaml

ASK = Ask("tiny", 2, 1000, 12_000)
WARM = HostView("host-1", "tiny", 2, 8, residents=(Resident("a"), Resident("b")), adapter_room=10_000)
SNAPSHOT = Snapshot(Capacity(2.0, 0.0), (WARM,), ())


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


def test_fit_on_a_warm_host_takes_its_turns_and_costs_its_own_tokens():
    found = fit(ASK, SNAPSHOT, {"host-1"}, {"tiny": 400.0})
    assert (found.never, found.host, found.beside) == (None, "host-1", 2)
    assert found.memory_bytes == 16_000
    assert found.seconds == pytest.approx(90.0)  # 30 s alone, every third turn
    assert found.rank_seconds == pytest.approx(60.0)  # 30 s of two ranks


def test_fit_chooses_the_fullest_host_that_takes_it():
    empty = HostView("host-2", "tiny", 2, 8)
    full = replace(WARM, name="host-3", slots=2)
    snapshot = replace(SNAPSHOT, hosts=(WARM, empty, full))
    assert fit(ASK, snapshot, {"host-1", "host-2", "host-3"}, {}).host == "host-1"
    assert fit(ASK, snapshot, {"host-2", "host-3"}, {}).host == "host-2"


def test_fit_without_a_host_or_a_pace_says_neither():
    found = fit(ASK, SNAPSHOT, set(), {})
    assert (found.host, found.seconds, found.rank_seconds, found.never) == (None, None, None, None)
    assert fit(ASK, None, set(), {"tiny": 400.0}).seconds == pytest.approx(30.0)


def test_fit_of_what_can_never_run_says_why():
    assert fit(replace(ASK, world_size=5), SNAPSHOT, set(), {}).never == (
        "it needs 5 ranks, and the cluster has 4"
    )
    wide = fit(replace(ASK, adapter_parameters=20_000), SNAPSHOT, {"host-1"}, {})
    assert wide.never == "its adapter has 20,000 parameters, and a host of its base has room for 10,000"
    assert wide.host is None


def test_submit_says_size_tokens_and_the_host_it_would_join(world, monkeypatch):
    monkeypatch.setattr("orchestrator.control.show.SHOW_SECONDS", 0.0)
    said = {}

    class Looking(FakeCluster):
        def poll(self, host):
            events = super().poll(host)
            if self.hosts[host].residents and "fit" not in said:
                other = world.one_job(seed=9, max_steps=10)
                (job,) = world.read("submit", other)["jobs"]
                if job["fit"]["host"]:
                    said["fit"] = job["fit"]
            return events

    world.make_cluster = Looking
    world.chorus("run", world.one_job(max_steps=60))
    found = said["fit"]
    assert (found["host"], found["beside"] >= 1, found["never"]) == ("host-1", True, None)
    assert found["adapter_parameters"] > 0
    assert found["memory_bytes"] == 16 * found["adapter_parameters"]


def test_submit_of_a_job_with_too_many_ranks_is_kept_and_says_so(world):
    world.chorus("run", world.one_job())
    write_yaml(world.folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 64})
    result = world.chorus("submit", world.one_job(seed=4))
    assert result.exit_code == 0
    assert "It cannot run as the cluster is: it needs 64 ranks, and the cluster has 2" in result.stdout
