"""A real PostgreSQL for the tests: a server of their own on a free port, in a temporary folder.

Started from Debian's binaries, as user `postgres` where the tests run as root: the server refuses root.
Where it is not installed its tests are skipped, saying so; with CHORUS_REQUIRE_POSTGRES=1, as in CI, they
fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator
from pathlib import Path

import psutil
import psycopg
import pytest

SECONDS = 60.0
USER = "postgres"


def binaries() -> Path | None:
    """The folder of the newest installed server; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


class Postgres:
    """One server. `kill` takes it away as a power cut would; `start` brings it back on the same port."""

    def __init__(self, *options: str) -> None:
        bin_folder = binaries()
        assert bin_folder is not None, "ask `binaries` first"
        self._bin, self._options = bin_folder, options
        self._folder = Path(tempfile.mkdtemp(prefix="chorus-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self._folder, USER, USER)
        self.port = _free_port()
        self._as_user("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "--no-sync")
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> None:
        """Returns when it answers. What a killed one left running holds its memory for a moment."""
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            if not self._alive():
                (self._data / "postmaster.pid").unlink(missing_ok=True)
                self._process = self._spawn()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL for the server and everything it forked."""
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self._process.wait()

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _alive(self) -> bool:
        return hasattr(self, "_process") and self._process.poll() is None

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = (
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self._folder}",
        )
        flags = [word for setting in (*settings, *self._options) for word in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*_runuser(), str(self._bin / "postgres"), "-D", str(self._data), *flags],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _as_user(self, program: str, *arguments: str) -> None:
        command = [*_runuser(), str(self._bin / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/")


def _runuser() -> list[str]:
    return ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require() -> None:
    """Skip the test, or fail it where PostgreSQL is required, if there is no server to start."""
    if binaries() is None:
        words = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        assert os.environ.get("CHORUS_REQUIRE_POSTGRES") != "1", words
        pytest.skip(words)


@pytest.fixture(scope="session")
def postgres() -> Generator[Postgres]:
    """A server for the session. Nobody cuts the power here, so it need not wait for the disk."""
    require()
    server = Postgres("fsync=off", "full_page_writes=off", "synchronous_commit=off")
    yield server
    server.close()
