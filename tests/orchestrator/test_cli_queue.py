"""Several who submit to one home: `submit`, `serve`, a `run` beside another, what is asked of that one."""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from orchestrator.api.explaining import explanation
from orchestrator.api.queue_view import claim_view
from orchestrator.commands import run as run_command
from orchestrator.home import Home
from orchestrator.job import Reason
from orchestrator.policy import Policy
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from tests.orchestrator.fakes import FakeCluster
from tests.orchestrator.recipe_files import write_yaml

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Set once a `run` watches another's work, which it then does often."""
    event, watching = threading.Event(), run_command.watching

    def noted(*arguments):
        event.set()
        return watching(*arguments)

    monkeypatch.setattr(run_command, "watching", noted)
    monkeypatch.setattr(run_command, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr("orchestrator.home.PATIENCE", 0.1)
    return event


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


@pytest.fixture
def on_postgres(world, postgres):
    """The same world, its store on a server."""
    world.home = type(world.home)(world.home.folder, postgres.new_database())
    return world


class UntilIdle(FakeCluster):
    """Stands for a person who stops `serve` once nothing is left to do."""

    world: CliWorld

    def capacity(self):
        with self.world.open_store(self.world.home) as store:
            if not store.unfinished_jobs():
                raise KeyboardInterrupt
        return super().capacity()


def serve(world):
    UntilIdle.world = world
    world.make_cluster = UntilIdle
    return world.chorus("serve")


@contextmanager
def busy(world, watched, then):
    """Somebody else works here until a `run` watches and `then(store)` is done."""

    def hold():
        with world.home.claim(), world.open_store(world.home) as store:
            held.set()
            deadline = time.monotonic() + 30
            while not watched.is_set() and time.monotonic() < deadline:
                time.sleep(0.01)
            then(store)

    held, thread = threading.Event(), threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    yield
    thread.join()


def cancel_all(store):
    for job in store.unfinished_jobs():
        store.switch_status(job.id, Reason.CANCELLED_BY_USER)


def test_submit_puts_jobs_into_the_queue_and_serve_does_them(world):
    submitted = world.read("submit", world.two_jobs())
    assert submitted["id"].startswith("demo-")
    assert [job["status"] for job in submitted["jobs"]] == ["WAITING"] * 3
    assert world.clusters == []
    assert "nobody works here" in world.chorus("ps").stdout
    result = serve(world)
    assert result.exit_code == 0, result.stderr
    assert "0 jobs are not finished" in result.stdout
    assert set(world.statuses().values()) == {"SUCCEEDED"}


def test_submit_and_serve_on_postgresql_end_like_on_sqlite(on_postgres):
    on_postgres.chorus("submit", on_postgres.two_jobs())
    assert not on_postgres.home.database.exists()
    assert serve(on_postgres).exit_code == 0
    assert set(on_postgres.statuses().values()) == {"SUCCEEDED"}
    assert [job["name"] for job in on_postgres.read("ps")] == ["finance", "support", "fused"]


def test_submit_again_is_the_same_run_until_it_has_ended_and_with_a_key_for_ever(world):
    first = world.read("submit", world.one_job(), "--key", "mine")["id"]
    assert world.read("submit", world.one_job())["id"] == first
    world.chorus("cancel", first)
    assert world.read("submit", world.one_job(), "--key", "mine")["id"] == first
    assert world.read("submit", world.one_job())["id"] != first


@pytest.mark.parametrize("key", ["", "k" * 201, "a\nb"])
def test_submit_under_a_key_that_no_store_takes_is_refused_and_makes_nothing(world, key):
    assert_one_sentence(world.chorus("submit", world.one_job(), "--key", key), 2, "--key", "from 1 to 200")
    assert world.read("ps") == []


def test_submit_under_the_longest_key_is_the_same_run_on_postgresql(on_postgres):
    first, again = (on_postgres.read("submit", on_postgres.one_job(), "--key", "é" * 200) for _ in "12")
    assert first["id"] == again["id"]


def test_store_whose_role_may_make_no_tables_is_told_what_to_grant(world, postgres):
    """The default since PostgreSQL 15: only a database's owner may make tables in its schema public."""
    url = postgres.new_database()
    role = f"ada{uuid4().hex[:8]}"
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN")
        world.home = Home(world.home.folder, url.replace("postgres@", f"{role}@"))
        refused = world.chorus("submit", world.one_job())
        assert_one_sentence(
            refused, 4, "permission denied for schema public", "`GRANT USAGE, CREATE ON SCHEMA"
        )
        owner.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")
    assert world.chorus("submit", world.one_job()).exit_code == 0


def test_store_whose_tables_are_anothers_is_told_what_to_grant(on_postgres, postgres):
    on_postgres.chorus("submit", on_postgres.one_job())
    url, role = on_postgres.home.store, f"ada{uuid4().hex[:8]}"
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN")
        on_postgres.home = Home(on_postgres.home.folder, url.replace("postgres@", f"{role}@"))
        assert_one_sentence(
            on_postgres.chorus("ps"), 4, "permission denied for table", "`GRANT ALL ON ALL TABLES"
        )
        for what in ("TABLES", "SEQUENCES"):
            owner.execute(f"GRANT ALL ON ALL {what} IN SCHEMA public TO {role}")
    assert on_postgres.chorus("submit", on_postgres.one_job(seed=7)).exit_code == 0


@pytest.mark.parametrize(
    ("store", "flag"),
    [
        ("sqlite:////data/one two.db", "--store 'sqlite:////data/one two.db'"),
        ("postgresql://ada@127.0.0.1:1/chorus", "--store postgresql://ada@127.0.0.1:1/chorus"),
        ("postgresql://ada:secret@127.0.0.1:1/chorus", '--store "$CHORUS_STORE"'),
        ("postgresql:///chorus?user=ada&password=secret", '--store "$CHORUS_STORE"'),
    ],
)
def test_hint_names_the_store_but_never_a_password(store, flag):
    assert Home(Path("/data/home"), store).flag() == f" --home /data/home {flag}"
    assert Home(Path("/data/home"), store).folder_flag() == " --home /data/home"


def test_hints_lead_to_the_store_that_was_named(world):
    world.home = Home(world.home.folder, f"sqlite:///{world.folder}/elsewhere.db")
    hint = world.chorus("submit", world.one_job()).stdout.partition("`chorus serve ")[2].partition("`")[0]
    assert hint == f"--home {world.home.folder} --store {world.home.store}"
    shown = world.chorus("run", world.one_job()).stdout
    assert f"ui --home {world.home.folder}\n" in shown, "which takes no store"


def test_submit_of_something_else_under_a_used_key_is_refused(world):
    world.chorus("submit", world.one_job(), "--key", "mine")
    result = world.chorus("submit", world.one_job(max_steps=9), "--key", "mine")
    assert_one_sentence(result, 2, "--key mine", "take another")


def test_submit_of_a_bad_recipe_makes_nothing(world):
    assert_one_sentence(world.chorus("submit", world.one_job(max_stepz=9)), 2, "max_stepz")
    assert not world.home.folder.exists()


def test_serve_beside_another_is_refused(world):
    with world.home.claim():
        assert_one_sentence(world.chorus("serve"), 3, "`chorus serve`", str(world.home.folder))


def test_run_beside_another_takes_over_when_that_one_ends(world, watched):
    with busy(world, watched, lambda store: None):
        result = world.chorus("run", world.one_job())
    assert result.exit_code == 0, (result.stdout, result.stderr)
    assert "another command works here" in result.stdout
    assert "starting the MLflow server" in result.stdout


def test_run_beside_another_watches_it_do_the_jobs_and_starts_nothing(world, watched):
    with busy(world, watched, cancel_all):
        result = world.chorus("run", world.one_job())
    assert result.exit_code == 103
    assert world.clusters == []


def test_run_works_on_what_others_have_submitted_too(world):
    other = world.read("submit", world.two_jobs())["id"]
    assert world.chorus("run", world.one_job(max_steps=60)).exit_code == 0
    # Trained beside it and sooner; how far their registration came when it ended, threads decide.
    trained = [job for job in world.read("status", other)["jobs"] if job["kind"] == "train"]
    assert [job["step"] for job in trained] == [job["num_steps"] for job in trained] == [5, 5]


@pytest.mark.parametrize(
    ("command", "words", "reason"),
    [
        (("pause",), "paused", Reason.PAUSED_BY_USER),
        (("priority", "high"), "priority 50 -> 75", Reason.SUBMITTED),
    ],
)
def test_what_is_asked_without_anybody_at_work_is_done_at_once(world, command, words, reason):
    world.chorus("submit", world.one_job())
    verb, *value = command
    assert world.chorus(verb, "finance", *value).exit_code == 0
    (job,) = world.read("ps")
    assert job["reason"] == reason
    assert any(words in event["reason_words"] + event["message"] for event in world.read("events", "finance"))


@pytest.mark.parametrize("command", [("pause",), ("resume",), ("cancel",), ("priority", "9")])
def test_what_is_asked_beside_one_at_work_is_asked_of_that_one(world, command):
    world.chorus("submit", world.one_job())
    verb, *value = command
    with world.home.claim():
        assert world.chorus(verb, "finance", *value).exit_code == 0
    with world.open_store(world.home) as store:
        (request,) = store.open_requests()
    assert (request.kind, request.value) == (verb, 9 if value else None)


def test_resume_lets_a_paused_job_run(world):
    world.chorus("submit", world.one_job())
    world.chorus("pause", "finance")
    world.chorus("resume", "finance")
    assert serve(world).exit_code == 0
    assert world.statuses() == {"finance": "SUCCEEDED"}


def test_priority_that_is_none_is_refused(world):
    world.chorus("submit", world.one_job())
    assert_one_sentence(world.chorus("priority", "finance", "urgent"), 2, "urgent", "0 to 100")


def test_events_say_who_when_from_to_and_why(world):
    world.chorus("run", world.one_job())
    rows = world.read("events", "finance")
    chain = [(row["from"], row["status"]) for row in rows if row["from"] != row["status"]]
    assert chain[0] == (None, "WAITING")
    assert [before for before, _ in chain[1:]] == [after for _, after in chain[:-1]]
    assert all(row["who"] and row["at"] and row["reason_words"] for row in rows)
    assert "WAITING" in world.chorus("events", "finance").stdout


def test_hosts_and_teams_show_who_sits_where_while_a_controller_works(world):
    seen = {}

    class Looking(FakeCluster):
        def poll(self, host):
            events = super().poll(host)
            with world.open_store(world.home) as store:
                board = store.boards.read("controller")
            if board and board.value["hosts"] and board.value["hosts"][0]["residents"] and not seen:
                seen.update(hosts=board.value["hosts"])
            return events

    world.make_cluster = Looking
    world.chorus("run", world.one_job(schedule={"team": "desk"}, max_steps=40))
    (host,) = seen["hosts"]
    assert (host["name"], host["world_size"], host["base"]) == ("host-1", 2, "tiny")
    assert host["residents"][0].endswith(".finance")
    assert world.read("hosts")["hosts"] == []
    assert world.read("teams") == []


def test_teams_hold_shares_of_the_ranks_in_use(world):
    from orchestrator.api.queue_view import teams

    world.chorus("submit", world.one_job(schedule={"team": "desk"}))
    world.chorus("submit", world.two_jobs())
    with world.open_store(world.home) as store:
        jobs = store.unfinished_jobs()
    mine, other = jobs[0].id, jobs[1].id
    rows = teams(
        jobs, [{"world_size": 4, "residents": [mine, other]}, {"world_size": 2, "residents": [mine]}]
    )
    assert [(row["team"], row["ranks"], row["share"]) for row in rows] == [
        ("default", 2.0, pytest.approx(1 / 3)),
        ("desk", 4.0, pytest.approx(2 / 3)),
    ]


def test_teams_show_what_their_turn_goes_by(world):
    world.chorus("submit", world.one_job(schedule={"team": "desk"}))
    write_yaml(world.home.folder / "teams.yaml", {"version": 1, "teams": {"desk": {"weight": 3, "quota": 2}}})
    (row,) = world.read("teams")
    assert (row["team"], row["weight"], row["quota"], row["used_lately"]) == ("desk", 3, 2, 0)
    day = Policy(half_life=86400.0)
    always_two = 2 * day.half_life / math.log(2)
    assert claim_view(day, {"desk": always_two}, "desk")["used_lately"] == pytest.approx(2)
    assert "used lately" in world.chorus("teams").stdout


def test_explain_names_who_goes_first_and_what_would_have_to_be_freed(world, monkeypatch):
    """Asked while another trains in the only slot, by what the scheduler itself decided."""
    monkeypatch.setattr("orchestrator.control.show.SHOW_SECONDS", 0.0)
    write_yaml(world.folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 2, "slots": 1})
    world.chorus("submit", world.two_jobs(finance_changes={"max_steps": 40}))
    world.chorus("submit", world.one_job(max_steps=7))
    found = {}

    class Looking(FakeCluster):
        def poll(self, host):
            with world.open_store(world.home) as store:
                waiting = [job for job in store.unfinished_jobs() if job.reason is Reason.WAITS_FOR_SLOT]
                if len(waiting) == 2:
                    found.update({job.name: explanation(store, job)[0] for job in waiting})
            return super().poll(host)

    world.make_cluster = Looking
    world.chorus("run", world.one_job(max_steps=7))
    first, second = found["support"], found["finance"]
    assert first.sentence == "It waits for a free slot on a host of its base; 0 jobs go first."
    assert second.sentence == "It waits for a free slot on a host of its base; 1 job goes first."
    assert second.ahead == (first.job,)
    assert second.to_free[0].startswith("a slot of host-1: demo-")


def test_explain_of_a_job_that_nobody_has_looked_at_and_of_one_that_is_done(world):
    world.chorus("submit", world.one_job())
    before = world.chorus("explain", "finance")
    assert "No controller has looked at it yet" in before.stdout
    assert "nobody works here now" in before.stdout
    serve(world)
    assert "It is SUCCEEDED: done." in world.chorus("explain", "finance").stdout
    assert world.read("explain", "finance")["status"] == "SUCCEEDED"


def test_ps_tells_the_place_in_line(world):
    world.chorus("submit", world.two_jobs())
    with world.open_store(world.home) as store:
        first, second, third = (job.id for job in store.jobs())
        store.boards.show("controller", {"hosts": [], "line": [[second, "x"], [first, "x"]]})
    assert {job["id"]: job["position"] for job in world.read("ps")} == {first: 2, second: 1, third: None}


@pytest.mark.parametrize("command", ["ps", "hosts", "teams"])
def test_store_that_does_not_answer_exits_with_4(world, monkeypatch, command):
    monkeypatch.setattr("tests.orchestrator.cli_world.PATIENCE", 0.0)
    world.home = type(world.home)(world.home.folder, "postgresql://nobody@127.0.0.1:1/none")
    assert_one_sentence(world.chorus(command), 4, "the store does not answer")
