"""`python -m orchestrator.registry.watch FOLDER URL`: keep one MLflow server alive while somebody uses it.

Owns the server's process group. Restarts a server that dies, on the same port; ends it when no process holds
`users.lock` any more, however that process ended. Writes `server.json`. Not for use by hand.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.registry.server import STATE, USERS, healthy

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Scorers, judges and traces are not ours: without their job runner the server is one process less.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1",
}


def main(folder: Path, url: str) -> int:
    """Watch until the last user has gone (0), or until a server ends that never answered (its exit status).

    Starting such a server again would not help; any other one is started again.
    """
    signal.signal(signal.SIGTERM, _leave)
    users = os.open(folder / USERS, os.O_RDWR)
    server = None
    try:
        while True:
            server = _start_server(folder, url)
            _write_state(folder, url, os.getpid())
            answered = _watch(server, url, users)
            _end(server)
            if not answered:
                return server.returncode or 1
    finally:
        if server is not None:
            _end(server)
        _write_state(folder, url, None)


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(0)


def _start_server(folder: Path, url: str) -> subprocess.Popen[bytes]:
    """One worker, SQLite and proxied artifacts under `folder`; `mlflow server` migrates before it listens."""
    address = urlsplit(url)
    command = [sys.executable, "-m", "mlflow", "server", "--host", str(address.hostname)]
    command += ["--port", str(address.port), "--workers", "1", "--serve-artifacts"]
    command += ["--uvicorn-opts", "--no-access-log"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """Have the kernel end the server if the watcher itself is killed (prctl PR_SET_PDEATHSIG, Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _watch(server: subprocess.Popen[bytes], url: str, users: int) -> bool:
    """Wait for the server to die; whether it ever answered. Ends this program when the last user has gone."""
    answered = False
    while server.poll() is None:
        if _nobody_left(users):
            sys.exit(0)
        answered = answered or healthy(url)
        time.sleep(POLL_SECONDS)
    return answered


def _nobody_left(users: int) -> bool:
    """Whether no command holds the lock any more.

    Once taken it is kept to the end of this process: a command that arrives now waits for it, then finds no
    server and starts its own.
    """
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server's whole group; also after its leader has died, for uvicorn is a child of it."""
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


def _write_state(folder: Path, url: str, pid: int | None) -> None:
    """Without a process id the address stays: the next start takes the same port if it can."""
    scratch = folder / f"{STATE}.new"
    scratch.write_text(json.dumps({"url": url, "pid": pid}) + "\n")
    scratch.replace(folder / STATE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
