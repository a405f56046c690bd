"""The tracking server's life: started once per home, shared, restarted, and never left behind."""

import json
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from orchestrator.contracts import RegistryUnreachable
from orchestrator.registry import server as tracking_server
from orchestrator.registry.server import ServerFailed
from orchestrator.registry.watch import _reserved
from tests.contract.samples import shared_server
from tests.postgres import postgres  # noqa: F401 (a fixture)
from workers.types import BadInput

SECONDS = 120
"""Longest any of this may take on a busy machine."""


def processes_of(home) -> list[psutil.Process]:
    """The watcher of `home` and everything below it."""
    state = json.loads((home / "mlflow" / "server.json").read_text())
    watcher = psutil.Process(state["pid"])
    return [watcher, *watcher.children(recursive=True)]


def all_end(processes) -> bool:
    return not psutil.wait_procs(processes, timeout=SECONDS)[1]


def other_command(home) -> subprocess.Popen:
    """Another process that holds the server of `home`; it has it once it has printed its line."""
    code = (
        "import sys; from pathlib import Path; from orchestrator.registry import server as tracking_server\n"
        "held = tracking_server.start(Path(sys.argv[1])); print(held.url, held.started, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(home)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_server_whose_command_is_killed_ends_with_it(tmp_path):
    command = other_command(tmp_path)
    url, started = command.stdout.readline().split()
    assert started == "True"
    processes = processes_of(tmp_path)
    assert len(processes) > 1
    command.kill()
    command.communicate()
    assert all_end(processes)
    assert not tracking_server.healthy(url)
    assert tracking_server.running_url(tmp_path) is None


def test_server_is_shared_and_outlives_the_command_that_started_it(tmp_path):
    first = other_command(tmp_path)
    url, _ = first.stdout.readline().split()
    with tracking_server.start(tmp_path) as mine:
        assert (mine.url, mine.started) == (url, False)
        processes = processes_of(tmp_path)
        first.kill()
        first.communicate()
        assert tracking_server.healthy(url)
        assert tracking_server.running_url(tmp_path) == url
    assert all_end(processes)


def test_server_started_again_keeps_port_and_runs(tmp_path):
    from orchestrator.registry.registry import MlflowRegistry

    with tracking_server.start(tmp_path) as first:
        run = MlflowRegistry(first.url).start_run("key", "jobs", "job", {}, {})
        server = processes_of(tmp_path)[1:]
        for process in server:
            process.kill()
        assert all_end(server)
        with tracking_server.start(tmp_path) as again:
            assert (again.url, again.started) == (first.url, False)
        assert MlflowRegistry(first.url).start_run("key", "jobs", "job", {}, {}) == run
    with tracking_server.start(tmp_path) as second:
        assert (second.url, second.started) == (first.url, True)
        assert MlflowRegistry(second.url).start_run("key", "jobs", "job", {}, {}) == run


def in_migration(home) -> bool:
    """Whether a database of `home`, whatever its name, has the first table of a migration that makes six."""
    files = [path for path in (home / "mlflow").glob("*mlflow.db*") if not path.name.endswith("-journal")]
    return any("mcp_servers" in tables(file) for file in files)


def tables(file) -> set[str]:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=0)) as database:
            rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    except sqlite3.Error:
        return set()
    return {name for (name,) in rows}


def test_server_whose_first_migration_was_killed_starts_again(tmp_path):
    command = other_command(tmp_path)
    deadline = time.monotonic() + SECONDS
    command_itself = psutil.Process(command.pid)
    while not in_migration(tmp_path):
        assert time.monotonic() < deadline
        assert command.poll() is None
    everything = [*reversed(command_itself.children(recursive=True)), command_itself]
    for process in everything:
        process.kill()
    command.communicate()
    assert all_end(everything)
    with tracking_server.start(tmp_path) as again:
        assert tracking_server.healthy(again.url)
    kept = {path.name for path in (tmp_path / "mlflow").glob("*mlflow.db*")}
    assert kept == {"mlflow.db"}


def test_server_on_a_port_in_use_is_refused_in_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"^port {port} is in use; [^\n]*$"):
            tracking_server.start(tmp_path, port)
    assert tracking_server.running_url(tmp_path) is None


def test_servers_that_chose_the_same_port_get_one_each(tmp_path, monkeypatch):
    choose = tracking_server._choose_port
    with tracking_server.start(tmp_path / "first") as first:
        taken = int(first.url.rpartition(":")[2])
        chosen = iter([taken, choose(tmp_path, None)])
        monkeypatch.setattr(tracking_server, "_choose_port", lambda folder, port: next(chosen))
        with tracking_server.start(tmp_path / "second") as second:
            assert second.url != first.url
            assert tracking_server.running_url(tmp_path / "first") == first.url
            assert tracking_server.running_url(tmp_path / "second") == second.url
    assert not any(chosen)


def test_port_of_a_server_that_is_down_is_no_free_port_yet_the_server_can_take_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _reserved(f"http://127.0.0.1:{port}"):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with closing(socket.create_server(("127.0.0.1", port))) as server:
            assert server.getsockname()[1] == port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_server_with_a_broken_database_says_where_to_look(tmp_path):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_text("this is no database, and long enough to be read as one")
    with pytest.raises(ServerFailed, match=r"server\.log"):
        tracking_server.start(tmp_path)


def test_registry_without_a_server_is_unreachable_within_seconds():
    from orchestrator.registry.registry import MlflowRegistry

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    for call in (lambda r: r.versions(), lambda r: r.start_run("k", "jobs", "job", {}, {})):
        with pytest.raises(RegistryUnreachable, match=str(port)):
            call(MlflowRegistry(f"http://127.0.0.1:{port}"))
    assert time.monotonic() - began < 10


def test_server_on_postgres_keeps_its_tables_there_and_its_home_refuses_another_store(
    postgres,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    import psycopg

    url = postgres.new_database()
    monkeypatch.setenv(tracking_server.STORE_VARIABLE, url)
    with tracking_server.start(tmp_path):
        words = " ".join(word for process in processes_of(tmp_path) for word in process.cmdline())
    assert "postgresql" not in words, "other users read a command line"
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()
    with psycopg.connect(url) as connection:
        (found,) = connection.execute("SELECT count(*) FROM registered_models").fetchone()
    assert found == 0
    monkeypatch.delenv(tracking_server.STORE_VARIABLE)
    with pytest.raises(
        BadInput, match=r"are in 127\.0\.0\.1:\d+/t\w+, not in sqlite; set CHORUS_REGISTRY_STORE"
    ):
        tracking_server.start(tmp_path)


def test_server_answers_no_request_from_another_site():
    """A page that was loaded from elsewhere, and one whose name was made to point at this machine."""
    url = f"{shared_server().url}/api/2.0/mlflow/experiments"
    with urlopen(f"{url}/get?experiment_id=0") as answer:
        assert json.loads(answer.read())["experiment"]["name"] == "Default"
    renamed = Request(f"{url}/get?experiment_id=0", headers={"Host": "elsewhere.example"})
    crossing = Request(f"{url}/create", b'{"name": "theirs"}', {"Origin": "http://elsewhere.example"})
    for request in (renamed, crossing):
        with pytest.raises(HTTPError) as refused:
            urlopen(request)
        assert refused.value.code == 403


def test_server_store_of_another_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(tracking_server.STORE_VARIABLE, "mysql://root@127.0.0.1/x")
    with pytest.raises(BadInput, match="is no address of PostgreSQL"):
        tracking_server.start(tmp_path)
