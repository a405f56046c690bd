"""`ps`, `status`, `logs`, `cancel`: what they say of a home that has run, that waits, and that is empty."""

from __future__ import annotations

import json

import pytest
import yaml

from orchestrator.api import service
from orchestrator.commands.progress import RunProgress
from orchestrator.registry.server import ServerFailed
from orchestrator.store.steps import StepStore
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence

pytestmark = pytest.mark.usefixtures("unsynced")

JOB_KEYS = {
    *("id", "run", "name", "kind", "task", "status", "reason", "reason_words", "message", "attempt", "host"),
    *("priority", "step", "num_steps", "loss", "tokens_per_second", "depends_on"),
    *("submitted_at", "started_at", "finished_at", "team", "position", "seconds_left", "progress", "about"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A world whose pipeline has run; tests only read it."""
    world = CliWorld(tmp_path_factory.mktemp("done"))
    assert world.chorus("run", world.two_jobs()).exit_code == 0
    return world


@pytest.fixture
def waiting(tmp_path):
    """A world whose pipeline was submitted and has not begun."""
    world = CliWorld(tmp_path)
    world.refuse_registry = ServerFailed("not now")
    assert world.chorus("run", world.two_jobs()).exit_code == 4
    return world


# ---- empty and unknown ----------------------------------------------------------------------------------


def test_ps_of_an_empty_home_is_an_empty_list_and_makes_nothing(tmp_path):
    world = CliWorld(tmp_path)
    assert world.read("ps") == []
    assert "no jobs" in world.chorus("ps").stdout
    assert not world.home.folder.exists()


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_job_of_an_empty_home_is_not_found(tmp_path, command):
    world = CliWorld(tmp_path)
    assert_one_sentence(world.chorus(command, "finance"), 102, "nothing was submitted")
    assert not world.home.folder.exists()


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_unknown_job_is_not_found(done, command):
    assert_one_sentence(done.chorus(command, "finanse"), 102, "'finanse'", "chorus ps")


# ---- reading --------------------------------------------------------------------------------------------


def test_ps_gives_the_same_stable_keys_as_json_and_yaml(done):
    jobs = done.read("ps")
    assert [job["name"] for job in jobs] == ["finance", "support", "fused"]
    assert all(set(job) == JOB_KEYS for job in jobs)
    assert yaml.safe_load(done.chorus("ps", "-o", "yaml").stdout) == jobs


def test_ps_without_all_leaves_out_finished_runs_but_the_newest(tmp_path):
    world = CliWorld(tmp_path)
    world.chorus("run", world.one_job(max_steps=2))
    world.chorus("run", world.one_job(max_steps=4))
    assert [job["num_steps"] for job in world.read("ps")] == [4]
    assert [job["num_steps"] for job in world.read("ps", "--all")] == [2, 4]


def test_ps_of_unfinished_jobs_says_that_nobody_works_on_them(waiting):
    words = "nobody works here"
    assert words in waiting.chorus("ps").stdout
    with waiting.home.claim():
        assert words not in waiting.chorus("ps").stdout


def test_status_of_a_job_has_its_steps_and_events(done):
    job = done.read("status", "support")
    assert JOB_KEYS | {"steps", "events"} == set(job)
    kinds = ["evaluate_base", "train", "evaluate", "register", "promote"]
    assert [(step["kind"], step["done"]) for step in job["steps"]] == [(kind, True) for kind in kinds]
    assert [event["status"] for event in job["events"]][-2:] == ["STOPPING", "SUCCEEDED"]


def test_status_of_a_run_has_scores_versions_and_releases(done):
    run = done.read("status", "demo")
    scores = {(score["task"], score["metric"]): score for score in run["outcome"]["scores"]}
    perplexity = scores["support", "perplexity"]
    assert (perplexity["base"], perplexity["adapter"], perplexity["fused"]) == (20.0, 5.0, 5.0)
    assert perplexity["retention"] == 1.0
    names = [version["name"] for version in run["outcome"]["versions"]]
    assert names == ["tiny.finance-sentiment", "tiny.support", "tiny.multitask"]
    assert [release["name"] for release in run["outcome"]["releases"]] == ["tiny.multitask"]


def test_status_finds_a_job_by_id_and_by_name(done):
    by_name = done.read("status", "fused")
    assert done.read("status", by_name["id"])["id"] == by_name["id"]


def test_looks_that_only_ask_which_steps_are_done_read_no_results(done, monkeypatch):
    def refuse(*_):
        raise AssertionError("results may be megabytes")

    monkeypatch.setattr(StepStore, "read", refuse)
    assert all(step["done"] for step in done.read("status", "fused")["steps"])
    assert all(step["done"] for job in done.read("plan", done.two_jobs())["jobs"] for step in job["steps"])
    with done.open_store(done.home) as store:
        assert len(RunProgress(store, store.runs()[0].id).look()) == 3


@pytest.mark.parametrize(("reference", "code"), [("demo", 101), ("finance", 101)])
def test_status_of_what_is_not_finished_exits_with_101(waiting, reference, code):
    assert waiting.chorus("status", reference).exit_code == code


def test_logs_have_events_and_steps_in_order_of_time(done):
    lines = done.read("logs", "finance")
    assert [line["step"] for line in lines if line["type"] == "step"] == [1, 2, 3, 4, 5]
    assert lines == sorted(lines, key=lambda line: line["at"])
    assert lines[0]["reason"] == "submitted"
    assert "step 5 loss" in done.chorus("logs", "finance").stdout


def test_logs_that_follow_a_finished_job_end_with_its_last_event(done):
    result = done.chorus("logs", "finance", "--follow", "-o", "json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == done.read("logs", "finance")
    assert result.exit_code == 0


def test_logs_of_a_run_of_several_jobs_ask_for_one(done):
    assert_one_sentence(done.chorus("logs", "demo"), 102, "finance, support, fused")


# ---- cancel ---------------------------------------------------------------------------------------------


def test_cancel_without_a_run_at_work_cancels_the_job_and_fails_what_needs_it(waiting):
    assert waiting.chorus("cancel", "finance").exit_code == 0
    assert waiting.statuses() == {"finance": "CANCELLED", "support": "WAITING", "fused": "FAILED"}
    assert waiting.chorus("status", "finance").exit_code == 103


def test_cancel_of_a_whole_run_cancels_every_job_and_the_next_run_is_new(waiting):
    assert waiting.chorus("cancel", "demo").exit_code == 0
    assert set(waiting.statuses().values()) == {"CANCELLED"}
    waiting.refuse_registry = None
    assert waiting.chorus("run", waiting.two_jobs()).exit_code == 0


def test_cancel_beside_a_run_at_work_asks_that_run(waiting):
    with waiting.home.claim():
        result = waiting.chorus("cancel", "finance")
    assert result.exit_code == 0
    assert waiting.statuses()["finance"] == "WAITING"
    with waiting.open_store(waiting.home) as store:
        (request,) = store.open_requests()
    assert (request.job.rpartition(".")[2], request.kind) == ("finance", "cancel")


@pytest.mark.parametrize("command", ["cancel", "pause", "resume"])
def test_change_of_a_job_that_finishes_before_the_lock_is_had_changes_nothing(tmp_path, monkeypatch, command):
    world = CliWorld(tmp_path)
    world.chorus("submit", world.two_jobs())
    find = service.find_jobs

    def found_before_the_run_ended(*arguments):
        jobs = find(*arguments)
        world.chorus("run", world.two_jobs())
        return jobs

    monkeypatch.setattr(service, "find_jobs", found_before_the_run_ended)
    result = world.chorus(command, "demo")
    assert result.exit_code == 0, result.exception
    assert "demo has finished already" in result.stdout
    assert set(world.statuses().values()) == {"SUCCEEDED"}


def test_cancel_of_a_finished_job_changes_nothing(done):
    assert "has finished already" in done.chorus("cancel", "finance").stdout
    assert done.statuses()["finance"] == "SUCCEEDED"
