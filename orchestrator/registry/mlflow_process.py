"""`python -m orchestrator.registry.mlflow_process FOLDER URL`: MLflow's server, all of it in one process.

Owns the making of a home's SQLite database. `mlflow db upgrade` and `mlflow server` would each import all of
MLflow, and the second starts uvicorn in a process that does so once more. The three follow one another here:
a server of one worker has no use for a process above it. Started by `orchestrator.registry.watch`, which sets
the environment; not for use by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.collector import without_collector
from orchestrator.registry.server import DATABASE, named_store


def main(folder: Path, url: str) -> None:
    """Serve until a signal. Ends with what MLflow's commands end with, its last line on stderr."""
    with without_collector():  # what is imported stays: to look through it takes a fifth of the time
        # uvicorn first: where MLflow's server finds it, it puts its checks of hosts and origins in place.
        import uvicorn
        from mlflow import server
        from mlflow.cli import cli

    if not named_store():  # PostgreSQL's migrations are transactions: the server makes its tables by itself
        make_database(folder)

    def serve(command: Sequence[str], extra_env: dict[str, str], **_: Any) -> None:
        """In place of the process that `mlflow server` would start with this command and environment."""
        os.environ.update(extra_env)
        _python, _m, _uvicorn, *arguments = command
        uvicorn.main(arguments)

    # An MLflow that starts it otherwise goes on doing so.
    server._exec_cmd = serve  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportAttributeAccessIssue]
    cli(_command(folder, url))


def make_database(folder: Path) -> None:
    """Migrate an empty database aside and rename it when it is whole, unless there is one.

    SQLite commits each table by itself, and MLflow does not take up a migration that was killed between two.
    """
    from mlflow.cli import cli

    for stale in folder.glob(f"new-*-{DATABASE}*"):
        stale.unlink(missing_ok=True)
    if not (folder / DATABASE).exists():
        scratch = folder / f"new-{os.getpid()}-{DATABASE}"
        cli(["db", "upgrade", f"sqlite:///{scratch}"], standalone_mode=False)
        scratch.rename(folder / DATABASE)


def _command(folder: Path, url: str) -> list[str]:
    """Proxied artifacts, one worker."""
    address = urlsplit(url)
    where = ["--host", str(address.hostname), "--port", str(address.port), "--workers", "1"]
    artifacts = ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    return ["server", *where, *artifacts, "--uvicorn-opts", "--no-access-log"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
