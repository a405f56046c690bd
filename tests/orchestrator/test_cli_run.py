"""`chorus run` on a cluster in memory: whole runs, refusals, failures, interruptions, nothing twice."""

from __future__ import annotations

import json
from contextlib import contextmanager
from threading import Barrier

import pytest

from orchestrator.contracts import ClusterUnreachable
from orchestrator.job import Status
from orchestrator.registry.server import ServerFailed
from tests.faults import files_limited_to
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from tests.orchestrator.fakes import FakeCluster
from tests.orchestrator.recipe_files import finance_rows, write_rows

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


# ---- whole runs -----------------------------------------------------------------------------------------


def test_run_pipeline_prints_scores_release_and_how_to_open_mlflow(world):
    result = world.chorus("run", world.two_jobs())
    assert result.exit_code == 0, result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["finance-sentiment", "macro_f1", "0.225", "0.9", "0.9", "100%"] in rows
    assert ["support", "perplexity", "20", "5", "5", "100%"] in rows
    assert (world.folder / "release/fused/README.md").is_file()
    assert "release: adapter tiny.multitask in" in result.stdout
    assert f"ui --home {world.home.folder}" in result.stdout
    assert world.statuses() == {"finance": "SUCCEEDED", "support": "SUCCEEDED", "fused": "SUCCEEDED"}


def test_run_without_a_terminal_prints_a_line_for_every_change_of_state(world):
    lines = world.chorus("run", world.one_job()).stdout.splitlines()
    said = [line.partition("] ")[2] for line in lines if line.startswith("[")]
    assert said[-1] == "finance SUCCEEDED: done"
    assert len(said) == len(set(said))


def test_run_again_does_nothing_and_shows_the_same_scores(world):
    first = world.chorus("run", world.two_jobs())
    again = world.chorus("run", world.two_jobs())
    assert again.exit_code == 0
    assert "nothing to do" in again.stdout
    assert again.stdout.partition("finance: ")[2] == first.stdout.rpartition("\n\nfinance: ")[2]
    assert len(world.clusters) == 1
    assert len(world.read("ps", "--all")) == 3


def test_run_again_after_the_release_folder_was_removed_writes_it_again(world):
    world.chorus("run", world.two_jobs())
    (world.folder / "release/fused").rename(world.folder / "elsewhere")
    result = world.chorus("run", world.two_jobs())
    assert result.exit_code == 0
    assert (world.folder / "release/fused/README.md").is_file()
    assert world.clusters[1].asked("Attach") == []


def test_run_with_local_asks_for_hosts_of_one_rank(world):
    sizes = []

    class Watched(FakeCluster):
        def start_host(self, host, base, world_size):
            sizes.append(world_size)
            super().start_host(host, base, world_size)

    world.make_cluster = lambda: Watched(cpus=1.0)
    assert world.chorus("run", world.one_job(), "--local").exit_code == 0
    assert sizes == [1]


# ---- refusals -------------------------------------------------------------------------------------------

REFUSALS = {
    "misspelt_key": ({"lora_rr": 8}, "lora_r"),
    "missing_file": ({"datasets": [{"path": "data/gone", "type": "chat"}]}, "no such data file"),
    "sequence_too_long": ({"sequence_len": 1000}, "128"),
    "module_that_matches_nothing": ({"lora_target_modules": ["q_prj"]}, "q_proj"),
    "unknown_metric": ({"evaluation": {"gates": {"macro_f2": ">= 0.5"}}}, "macro_f1"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("command", [("run",), ("plan",), ("recipe", "validate")])
def test_bad_recipe_is_refused_in_one_sentence_and_nothing_is_made(world, case, command):
    changes, words = REFUSALS[case]
    result = world.chorus(*command, world.one_job(**changes))
    assert_one_sentence(result, 2, "finance.yaml:", words)
    assert not world.home.folder.exists()


BAD_ROWS = {
    "unknown_label": ({"text": "up", "label": "great"}, "great"),
    "missing_field": ({"text": "up"}, "label"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_refused_by_file_and_line_and_nothing_is_made(world, case):
    row, words = BAD_ROWS[case]
    write_rows(world.folder / "data/finance/train.jsonl", [*finance_rows(3), row])
    assert_one_sentence(world.chorus("run", world.one_job()), 2, "train.jsonl:4", words)
    assert not world.home.folder.exists()


def test_run_of_no_file_is_refused(world):
    assert_one_sentence(world.chorus("run", "gone.yaml"), 2, "gone.yaml")


def test_run_whose_release_folder_exists_is_refused_before_it_begins(world):
    (world.folder / "release/fused").mkdir(parents=True)
    assert_one_sentence(world.chorus("run", world.two_jobs()), 2, "release/fused exists already")
    assert world.read("ps") == []
    assert world.clusters == []


def test_run_on_a_full_disk_says_so_and_works_when_there_is_room(world):
    recipe = world.one_job()
    with files_limited_to(8192):
        result = world.chorus("run", recipe)
    assert_one_sentence(result, 1, "disk")
    assert world.chorus("run", recipe).exit_code == 0


def test_run_with_local_of_a_run_begun_on_two_ranks_is_refused(world):
    world.refuse_registry = ServerFailed("the server ended while starting")
    world.chorus("run", world.one_job())
    world.refuse_registry = None
    assert_one_sentence(world.chorus("run", world.one_job(), "--local"), 2, "2 ranks", "chorus cancel")
    assert world.chorus("run", world.one_job()).exit_code == 0


# ---- failures -------------------------------------------------------------------------------------------


def test_run_whose_job_diverges_exits_with_100_and_says_why(world):
    world.faults.stops["finance", 2] = "diverged"
    result = world.chorus("run", world.two_jobs())
    assert result.exit_code == 100
    assert "finance FAILED: its gradient stayed non-finite: after step 1" in result.stdout
    assert "fused FAILED: a job it depends on did not succeed" in result.stdout
    assert world.statuses()["support"] == "SUCCEEDED"


def test_run_that_misses_its_gate_exits_with_100_and_says_by_how_much(world):
    result = world.chorus("run", world.one_job(evaluation={"gates": {"macro_f1": ">= 0.95"}}))
    assert result.exit_code == 100
    assert "required >= 0.95: short by 0.05" in result.stdout


def test_run_whose_job_is_cancelled_exits_with_103(world):
    def cancelling():
        with world.open_store(world.home) as store:
            store.request(store.jobs()[0].id, "cancel")
        return FakeCluster()

    world.make_cluster = cancelling
    assert world.chorus("run", world.two_jobs()).exit_code == 103
    assert world.statuses() == {"finance": "CANCELLED", "support": "SUCCEEDED", "fused": "FAILED"}


def test_run_without_a_registry_exits_with_4_and_keeps_the_job(world):
    world.refuse_registry = ServerFailed("the MLflow server ended while starting")
    assert_one_sentence(world.chorus("run", world.one_job()), 4, "MLflow server")
    assert world.statuses() == {"finance": "WAITING"}


class Interrupted(FakeCluster):
    """Ctrl-C at the twelfth look at a host."""

    def poll(self, host):
        if self.polls >= 12:
            raise KeyboardInterrupt
        return super().poll(host)


def test_run_interrupted_exits_with_130_and_the_next_goes_on_from_a_checkpoint(world):
    recipe = world.one_job(max_steps=20)
    world.make_cluster = Interrupted
    result = world.chorus("run", recipe)
    assert result.exit_code == 130
    assert f"To go on: chorus run {recipe} --home {world.home.folder}" in result.stdout
    assert world.statuses() == {"finance": "WAITING"}
    assert world.clusters[0].hosts == {}

    world.make_cluster = FakeCluster
    assert world.chorus("run", recipe).exit_code == 0
    status = world.read("status", "finance")
    assert (status["attempt"], status["step"]) == (2, 20)
    assert world.clusters[1].asked("Evaluate")[0].adapter_dir is not None  # the base was scored before


def test_run_in_the_background_leaves_the_job_to_a_process_of_its_own(world, monkeypatch):
    started = []

    class Process:
        pid = 4711

        def __init__(self, command, **settings):
            started.append((command, settings["start_new_session"], world.home.claimed()))

    monkeypatch.setattr("orchestrator.commands.run.subprocess.Popen", Process)
    result = world.chorus("run", world.one_job(), "--no-follow", "--cpus", "3")
    assert result.exit_code == 0
    ((command, detached, claimed),) = started
    assert command[3:] == ["run", str(world.one_job()), "--cpus", "3", "--home", str(world.home.folder)]
    assert (detached, claimed) == (True, False)
    assert world.statuses() == {"finance": Status.WAITING}
    assert "process 4711" in result.stdout


# ---- before a run ---------------------------------------------------------------------------------------


def test_plan_tells_sizes_and_what_is_done_already(world):
    before = world.read("plan", world.two_jobs())
    assert [job["name"] for job in before["jobs"]] == ["finance", "support", "fused"]
    assert before["jobs"][0]["adapter_bytes"] == 4 * before["jobs"][0]["adapter_parameters"] > 0
    assert not any(step["done"] for job in before["jobs"] for step in job["steps"])
    assert not world.home.folder.exists()
    world.chorus("run", world.one_job())
    after = world.read("plan", world.two_jobs())
    assert [all(step["done"] for step in job["steps"]) for job in after["jobs"]] == [True, False, False]


def test_validate_tells_rows_and_registered_name_and_what_was_read_otherwise(world):
    value = world.read("recipe", "validate", world.one_job(max_steps=None, num_train_epochs=2))
    assert value["jobs"][0]["rows"] == {"train": 10, "validation": 4, "test": 4}
    assert value["jobs"][0]["registered_name"] == "tiny.finance-sentiment"
    assert len(value["notices"]) == 1


def test_schema_is_json_that_names_the_keys(world):
    assert "lora_r" in json.loads(world.chorus("recipe", "schema").stdout)["$defs"]["Recipe"]["properties"]


# ---- starting -------------------------------------------------------------------------------------------


def test_run_starts_the_server_and_the_cluster_side_by_side(world, monkeypatch):
    """Each waits for the other to have begun: one after the other would never meet."""
    both = Barrier(2, timeout=10)

    @contextmanager
    def meet(home):
        both.wait()
        yield

    def cluster():
        both.wait()
        return FakeCluster()

    monkeypatch.setattr(world, "open_server", meet)
    world.make_cluster = cluster
    assert world.chorus("run", world.one_job()).exit_code == 0


def test_run_whose_cluster_and_server_both_fail_says_one_sentence(world):
    def refuse():
        raise ClusterUnreachable("Ray does not answer: no room")

    world.make_cluster = refuse
    world.refuse_registry = ServerFailed("the MLflow server ended while starting")
    assert_one_sentence(world.chorus("run", world.one_job()), 4, "Ray does not answer")
    assert world.statuses() == {"finance": "WAITING"}


def test_plan_of_a_distillation_counts_what_student_and_teachers_read(world):
    block = {"rule": "distill", "rank": 4, "distill": {"max_steps": 3}}
    fused = world.read("plan", world.two_jobs(**block))["jobs"][-1]
    assert fused["num_steps"] == 3
    assert fused["train_rows"] == 20
    assert [step["kind"] for step in fused["steps"]][:2] == ["fuse", "train"]
