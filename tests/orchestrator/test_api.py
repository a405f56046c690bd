"""`chorus api` and `--server`: a real server of HTTP, asked by the real client through the commands."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest
import requests
import uvicorn
from typer.testing import CliRunner

from orchestrator.api import tokens
from orchestrator.api.http import Desk, make_app
from orchestrator.api.service import HomeService
from orchestrator.commands.cli import app
from orchestrator.store.engine import open_engine
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence

pytestmark = pytest.mark.usefixtures("unsynced")
READS = (
    *(("ps",), ("ps", "--all"), ("status", "finance"), ("status", "demo"), ("events", "finance")),
    *(("explain", "support"), ("logs", "finance"), ("hosts",), ("teams",)),
)


class Server:
    """A `chorus api` of a world, in a thread; `chorus` gives commands to it in ada's name."""

    def __init__(self, world: CliWorld, stack: ExitStack) -> None:
        self.world = world
        self.store = store = stack.enter_context(world.open_store(world.home))
        desk = Desk(
            service=lambda who: HomeService(
                world.home, lambda: store, lambda: world.open_registry(world.home), who
            ),
            holder=lambda token: tokens.holder(world.home.folder, token),
        )
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.token = tokens.grant(world.home.folder, "ada")
        server = uvicorn.Server(uvicorn.Config(make_app(desk), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        stack.callback(thread.join)
        stack.callback(lambda: setattr(server, "should_exit", True))

    def chorus(self, *arguments, token=None):
        words = [*map(str, arguments), "--server", self.url]
        return CliRunner().invoke(app, words, obj=None, env={"CHORUS_TOKEN": token or self.token})

    def read(self, *arguments):
        result = self.chorus(*arguments, "-o", "json")
        assert result.stdout, (result.stderr, result.exception)
        return json.loads(result.stdout)

    def ask(self, verb, path, **more):
        headers = {"Authorization": f"Bearer {self.token}"}
        return requests.request(verb, f"{self.url}/v1{path}", headers=headers, timeout=30, **more)


@contextmanager
def serving(world):
    with ExitStack() as stack:
        yield Server(world, stack)


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


@pytest.fixture
def server(world):
    with serving(world) as server:
        yield server


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A server of a home whose run is done; tests only look."""
    world = CliWorld(tmp_path_factory.mktemp("done"))
    assert world.chorus("run", world.two_jobs()).exit_code == 0
    with serving(world) as server:
        yield server


# ---- the same answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_a_look_through_the_server_is_the_look_into_the_home(finished, command):
    assert finished.read(*command) == finished.world.read(*command)
    here, there = finished.world.chorus(*command), finished.chorus(*command)
    assert (there.exit_code, there.stderr) == (here.exit_code, here.stderr)
    of_place = ("to open MLflow", "nobody works in", "as shown")
    kept = [line for line in here.stdout.splitlines() if not line.startswith(of_place)]
    assert [line for line in there.stdout.splitlines() if not line.startswith(of_place)] == kept


def test_logs_are_followed_to_the_end_of_the_job(finished):
    assert finished.chorus("logs", "finance", "-f", "-o", "json").stdout.count("\n") > 3


def test_what_is_submitted_through_the_server_is_done_and_bears_the_name(world, server):
    submitted = server.read("submit", world.two_jobs())
    assert [job["status"] for job in submitted["jobs"]] == ["WAITING"] * 3
    assert server.read("submit", world.two_jobs())["id"] == submitted["id"]
    assert world.chorus("run", world.two_jobs()).exit_code == 0
    assert {job["status"] for job in server.read("ps")} == {"SUCCEEDED"}
    assert server.read("events", "finance")[0]["who"] == "ada"


def test_a_key_is_the_same_run_for_ever(world, server):
    first = server.read("submit", world.one_job(), "--key", "mine")["id"]
    assert server.chorus("cancel", first).exit_code == 0
    assert server.read("submit", world.one_job(), "--key", "mine")["id"] == first
    assert server.read("submit", world.one_job())["id"] != first


def test_a_key_that_no_store_takes_is_refused(world, server):
    assert_one_sentence(server.chorus("submit", world.one_job(), "--key", "k" * 201), 2, "from 1 to 200")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("pause",), "paused"),
        (("priority", "high"), "priority 50 -> 75"),
        (("cancel",), "cancelled"),
    ],
)
def test_a_change_is_done_at_once_where_nobody_works(world, server, command, words):
    server.chorus("submit", world.one_job())
    verb, *value = command
    result = server.chorus(verb, "finance", *value)
    assert result.exit_code == 0, result.stderr
    last = world.read("events", "finance")[-1]
    assert words in last["reason_words"] + last["message"]
    assert last["who"] == "ada"
    assert (
        f"finance{' has finished' if verb == 'cancel' else ''}"
        in server.chorus(verb, "finance", *value).stdout
    )


def test_a_change_beside_one_at_work_is_asked_of_that_one_in_the_callers_name(world, server, monkeypatch):
    monkeypatch.setattr("orchestrator.home.PATIENCE", 0.1)
    server.chorus("submit", world.one_job())
    with world.home.claim():
        assert "asked the run at work to cancel" in server.chorus("cancel", "finance").stdout
        assert "nobody works here" not in server.chorus("ps").stdout
    with world.open_store(world.home) as store:
        (request,) = store.open_requests()
    assert (request.kind, request.who) == ("cancel", "ada")


# ---- who may ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/jobs", "/jobs/x", "/hosts", "/teams"])
def test_nobody_asks_without_a_token(server, path):
    for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Basic YTpi"}):
        response = requests.get(f"{server.url}/v1{path}", headers=headers, timeout=30)
        assert (response.status_code, response.json()["code"]) == (401, 3)


def test_a_wrong_token_is_refused_in_one_sentence(server):
    assert_one_sentence(server.chorus("ps", token="guess"), 3, "no valid token", "chorus token NAME")


def test_a_missing_token_is_said_before_anything_is_asked(server):
    result = CliRunner().invoke(app, ["ps", "--server", server.url], env={"CHORUS_TOKEN": ""})
    assert_one_sentence(result, 2, "CHORUS_TOKEN is not set")


def test_a_new_token_of_a_name_ends_the_old_one(world, server):
    fresh = world.chorus("token", "ada").stdout.strip()
    assert_one_sentence(server.chorus("ps"), 3, "no valid token")
    assert server.chorus("ps", token=fresh).exit_code == 0


def test_tokens_are_kept_as_digests_that_others_cannot_read(world, server):
    file = world.home.folder / tokens.FILE
    assert server.token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert_one_sentence(world.chorus("token", "two words"), 2, "no name for a token")


# ---- what cannot be done --------------------------------------------------------------------------------


def test_a_refusal_is_the_sentence_and_the_code_of_the_command_itself(world, server):
    bad = world.one_job(max_stepz=9)
    assert_one_sentence(server.chorus("submit", bad), 2, "max_stepz", str(bad))
    assert_one_sentence(server.chorus("status", "nothing"), 102, "there is no job or run 'nothing'")
    assert_one_sentence(server.chorus("submit", world.folder / "none.yaml"), 2, "none.yaml")
    assert server.read("ps") == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"file": "finance.yaml"}, "not an absolute path"),
        ({}, "body.file"),
        ({"file": "/a", "kay": "b"}, "body.kay"),
    ],
)
def test_a_malformed_submission_says_what_is_wrong(server, body, words):
    response = server.ask("POST", "/runs", json=body)
    assert response.status_code == 422
    assert words in response.json()["message"]


def test_a_priority_that_is_none_is_refused(world, server):
    server.chorus("submit", world.one_job())
    response = server.ask("POST", "/jobs/finance/changes", json={"kind": "priority", "value": "urgent"})
    assert (response.status_code, response.json()["code"]) == (422, 2)
    assert "low, normal, high" in response.json()["message"]


def test_an_error_of_ours_is_told_without_its_insides(server, monkeypatch, caplog):
    monkeypatch.setattr(HomeService, "teams", lambda self: 1 / 0)
    response = server.ask("GET", "/teams")
    assert (response.status_code, response.json()["code"]) == (500, 1)
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text


def test_a_server_that_is_away_or_is_another_exits_with_4(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    assert_one_sentence(
        CliRunner().invoke(app, ["ps", "--server", f"http://127.0.0.1:{port}"], env={"CHORUS_TOKEN": "x"}),
        4,
        "does not answer",
    )
    assert_one_sentence(
        CliRunner().invoke(app, ["ps", "--server", f"{server.url}/docs"], env={"CHORUS_TOKEN": "x"}), 4, "404"
    )
    result = CliRunner().invoke(app, ["ps", "--server", "localhost"], env={"CHORUS_TOKEN": "x"})
    assert_one_sentence(result, 2, "http://HOST:PORT")


def test_a_store_that_is_away_exits_with_4(world, monkeypatch):
    monkeypatch.setattr("tests.orchestrator.cli_world.PATIENCE", 0.1)
    with serving(world) as server:
        server.store.close()
        server.store._engine = open_engine("postgresql://nobody@127.0.0.1:1/none")
        assert_one_sentence(server.chorus("ps"), 4, "the store does not answer")


# ---- the command itself ---------------------------------------------------------------------------------


def test_the_command_answers_until_sigterm_and_its_port_is_its_own(world, tmp_path):
    token = world.chorus("token", "bob").stdout.strip()
    command = [sys.executable, "-m", "orchestrator.main", "api", "--home", str(world.home.folder)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split(" at ")[1].split()[0]
        result = CliRunner().invoke(
            app, ["ps", "-o", "json", "--server", address], env={"CHORUS_TOKEN": token}
        )
        second = subprocess.run(
            [*command, "--port", address.rpartition(":")[2]], capture_output=True, text=True, timeout=60
        )
        process.send_signal(signal.SIGTERM)
        ended = process.wait(30)
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "Address already in use" in second.stderr
    assert ended in (0, -signal.SIGTERM)


def test_the_command_without_any_token_is_refused(world):
    assert_one_sentence(world.chorus("api"), 2, "chorus token NAME")
