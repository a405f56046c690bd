"""`python -m orchestrator.registry.watch FOLDER URL LOCK`: one MLflow server, alive while somebody uses it.

Owns the server's process group. Restarts a server that dies, on the same port; ends it when no process holds
`users.lock` any more, however that process ended. Writes `server.json`; until then it keeps the descriptor
LOCK open, which holds `start.lock`. Not for use by hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from orchestrator.registry.server import DATABASE, STATE, USERS, healthy, named_store

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Scorers, judges and traces are not ours: without their job runner the server is one process less.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1",
}


def main(folder: Path, url: str, lock: int) -> int:
    """Watch until the last user has gone (0), or until a server ends that never answered (its exit status).

    Starting such a server again would not help; any other one is started again.
    """
    signal.signal(signal.SIGTERM, _leave)
    users = os.open(folder / USERS, os.O_RDWR)
    _write_state(folder, url, os.getpid())
    # Whoever started this may be dead already: from here on the next command finds us.
    os.close(lock)
    try:
        with _reserved(url):
            while not (failed := _serve(folder, url, users)):
                pass
        return failed
    finally:
        _write_state(folder, url, None)


@contextlib.contextmanager
def _reserved(url: str) -> Generator[None]:
    """Keep the port from being chosen as a free one, before the server is up and while it is started again.

    Bound and never listened on: with SO_REUSEADDR on both, the server can bind it as well (Linux, macOS).
    Raises OSError if something listens there.
    """
    address = urlsplit(url)
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((address.hostname, address.port))
        yield


def _serve(folder: Path, url: str, users: int) -> int:
    """One life of the server; 0 if it ever answered, else its exit status."""
    server = _start_server(folder, url)
    try:
        answered = _watch(server, folder, url, users)
    finally:
        _end(server)
    return 0 if answered else server.returncode or 1


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(0)


def _start_server(folder: Path, url: str) -> subprocess.Popen[bytes]:
    """In a process group of its own. The store may have a password: it goes by the environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.registry.mlflow_process", str(folder), url],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": _store_uri(folder)},
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _store_uri(folder: Path) -> str:
    named = named_store()
    return named.replace("postgresql:", "postgresql+psycopg:", 1) or f"sqlite:///{folder / DATABASE}"


def _die_with_parent() -> None:
    """Have the kernel end the child if the watcher itself is killed (prctl PR_SET_PDEATHSIG, Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _watch(server: subprocess.Popen[bytes], folder: Path, url: str, users: int) -> bool:
    """Wait for the server to die; whether it ever answered. Ends this program when the last user has gone.

    Whoever starts a server waits until this has seen it answer: one that dies after that is started again.
    """
    answered = False
    while server.poll() is None:
        _leave_if_alone(users)
        if not answered and healthy(url) and _listens(server.pid, url):
            _write_state(folder, url, os.getpid(), answered=True)
            answered = True
        time.sleep(POLL_SECONDS)
    return answered


def _listens(pid: int, url: str) -> bool:
    """Whether it is this server that answers at `url`, not one of another home that was first at the port."""
    port = urlsplit(url).port
    with contextlib.suppress(psutil.Error):
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _leave_if_alone(users: int) -> None:
    """End this program when no command holds the lock any more.

    Once taken it is kept to the end of this process: a command that arrives now waits for it, then finds no
    server and starts its own.
    """
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sys.exit(0)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server's whole group, also after its leader has died: MLflow may have children there."""
    for kill, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(server.pid, kill)
        except ProcessLookupError:
            break
        _wait_group(server, seconds)
    server.wait()


def _wait_group(server: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        server.poll()
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _write_state(folder: Path, url: str, pid: int | None, answered: bool = False) -> None:
    """Without a process id the address stays: the next start takes the same port if it can."""
    scratch = folder / f"{STATE}.new"
    scratch.write_text(json.dumps({"url": url, "pid": pid, "answered": answered}) + "\n")
    scratch.replace(folder / STATE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
