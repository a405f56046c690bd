"""The MLflow tracking server of one home: started, migrated, shared between commands, and ended.

Owns `<home>/mlflow`: the SQLite file, the artifacts, the log and `server.json`. Imports no mlflow: the server
is a process of its own, looked after by `orchestrator.registry.watch`. Every command that uses it holds a
shared lock on `users.lock`, which the kernel drops however the command ends; the watcher ends the server when
nobody holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

from orchestrator.disk import scarce
from workers.types import BadInput

STATE = "server.json"
USERS = "users.lock"
LOG = "server.log"
DATABASE = "mlflow.db"
STORE = "store"
"""Says where the versions of this home are, once a server has answered."""
PORTS_TRIED = 5
STORE_VARIABLE = "CHORUS_REGISTRY_STORE"
"""postgresql://USER[:PASSWORD]@HOST/DATABASE for MLflow's tables; SQLite in the home unless it is set."""


class ServerFailed(RuntimeError):
    """The tracking server did not come up; the message ends with the last lines of its log."""


@dataclass
class TrackingServer:
    """A hold on the running server of a home. Ends the server on `stop` if nobody else holds it."""

    url: str
    home: Path
    log: Path
    started: bool
    """False when another command had started it."""
    _users: IO[str]
    _watcher: subprocess.Popen[bytes] | None

    def stop(self, seconds: float = 15.0) -> None:
        """Let go of the server. Returns when it has ended, or at once if another command still uses it.

        One that is slow to end is waited for no longer than `seconds`: its watcher sees to the rest.
        """
        if self._users.closed:
            return
        alone = _last_user(self._users)
        self._users.close()
        if alone and self._watcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watcher.wait(seconds)

    def __enter__(self) -> TrackingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(home: Path, port: int | None = None, seconds: float = 120.0) -> TrackingServer:
    """The server of `home`, started unless a command is running it already; answers `/health` on return.

    `port` None takes the port of the last start if it is free, else any free one, so that a restarted server
    keeps its address; yet another one if something took that while the server was starting. Raises BadInput
    if the wanted port is taken or the versions are in another store, ServerFailed if the server is not up in
    `seconds`.
    """
    folder = home.resolve() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    _check_store(folder)
    with _exclusive(folder / "start.lock") as lock:
        users = (folder / USERS).open("a")
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            url = _watched_url(folder)
            if url and _becomes_healthy(url, folder, seconds):
                return TrackingServer(url, home, folder / LOG, False, users, None)
            url, watcher = _start(folder, port, lock, seconds)
            (folder / STORE).write_text(store_words())
        except BaseException:
            users.close()
            raise
    return TrackingServer(url, home, folder / LOG, True, users, watcher)


def named_store() -> str:
    """The user's own database for MLflow's tables; empty for the home's SQLite file. Raises BadInput."""
    named = os.environ.get(STORE_VARIABLE, "")
    if named and not named.startswith("postgresql://"):
        raise BadInput(f"{STORE_VARIABLE} is no address of PostgreSQL; write postgresql://USER@HOST/DATABASE")
    return named


def store_words() -> str:
    """The store, without its user and password."""
    address = urlsplit(named_store())
    return f"{address.hostname}:{address.port or 5432}{address.path}" if address.hostname else "sqlite"


def _check_store(folder: Path) -> None:
    """A home that was used with one store must not be seen empty with another."""
    known = "sqlite" if (folder / DATABASE).exists() else store_words()
    with contextlib.suppress(FileNotFoundError):
        known = (folder / STORE).read_text()
    if known != store_words():
        raise BadInput(
            f"the versions of {folder.parent} are in {known}, not in {store_words()}; "
            f"set {STORE_VARIABLE} as it was, or use another --home"
        )


def running_url(home: Path) -> str | None:
    """The address of the server now running for `home`, None if there is none that answers."""
    url = _watched_url(home.resolve() / "mlflow")
    return url if url and healthy(url, seconds=5.0) else None


def healthy(url: str, seconds: float = 2.0) -> bool:
    """Whether a tracking server answers at `url`."""
    try:
        with urlopen(f"{url}/health", timeout=seconds) as answer:
            return answer.read() == b"OK"
    except (URLError, OSError, ValueError):
        return False


@contextmanager
def _exclusive(path: Path) -> Generator[int]:
    """Hold the lock until the block ends, and longer in a process that was given the descriptor."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _last_user(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_state(folder: Path) -> dict[str, object] | None:
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None


def _watched_url(folder: Path) -> str | None:
    """The address recorded by a watcher that still runs; a process id may since belong to something else."""
    state = _read_state(folder)
    if not state or not state.get("pid"):
        return None
    try:
        command = psutil.Process(int(str(state["pid"]))).cmdline()
    except psutil.Error:
        return None
    return str(state["url"]) if str(folder) in command else None


def _becomes_healthy(url: str, folder: Path, seconds: float) -> bool:
    """Wait for a server that is being started again; False if its watcher gives up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _watched_url(folder) == url:
        if healthy(url):
            return True
        time.sleep(0.1)
    return False


def _choose_port(folder: Path, wanted: int | None) -> int:
    if wanted is not None:
        if not _port_is_free(wanted):
            raise BadInput(
                f"port {wanted} is in use; choose another with --port, or leave it out for a free one"
            )
        return wanted
    last = str((_read_state(folder) or {}).get("url", "")).rpartition(":")[2]
    if last.isdigit() and _port_is_free(int(last)):
        return int(last)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError:
            raise BadInput(f"port {port} does not exist; choose one between 1024 and 65535") from None
        except OSError:
            return False
    return True


def _start(
    folder: Path, port: int | None, lock: int, seconds: float, tries: int = PORTS_TRIED
) -> tuple[str, subprocess.Popen[bytes]]:
    """The address of a server that has answered, and its watcher.

    A port is nobody's until it is bound: one that another process took between our look and the server's
    start is given up for another.
    """
    chosen = _choose_port(folder, port)
    url = f"http://127.0.0.1:{chosen}"
    watcher = _launch(folder, url, lock)
    try:
        _wait_answered(folder, watcher, seconds)
    except ServerFailed:
        if port is not None or tries == 1 or _port_is_free(chosen):
            raise
        return _start(folder, port, lock, seconds, tries - 1)
    return url, watcher


def _launch(folder: Path, url: str, lock: int) -> subprocess.Popen[bytes]:
    """A watcher that keeps `lock` until it can be found: one whose starter is killed is not started twice."""
    command = [sys.executable, "-m", "orchestrator.registry.watch", str(folder), url, str(lock)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
        )


def _wait_answered(folder: Path, watcher: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the watcher has seen its server answer."""
    log, deadline = folder / LOG, time.monotonic() + seconds
    while not _has_answered(folder, watcher.pid):
        if watcher.poll() is not None:
            words = f"the MLflow server ended while starting; see {log}: {_last_line(log)}"
            raise ServerFailed(words + scarce(folder))
        if time.monotonic() > deadline:
            watcher.terminate()
            watcher.wait()
            raise ServerFailed(f"the MLflow server did not answer within {seconds:.0f} s; see {log}")
        time.sleep(0.1)


def _has_answered(folder: Path, watcher: int) -> bool:
    state = _read_state(folder) or {}  # another watcher's, if that one was killed and this one has only begun
    return state.get("pid") == watcher and bool(state.get("answered"))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(empty)"
