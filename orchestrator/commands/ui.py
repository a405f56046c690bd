"""`chorus ui`: the MLflow page of a home, served until Ctrl-C."""

from __future__ import annotations

import threading

from rich.console import Console

from orchestrator.home import Home
from orchestrator.registry import server as tracking_server


def ui(home: Home, port: int | None, out: Console) -> None:
    """Start the server, or join the one that runs, and wait. Raises BadInput for a port that is taken."""
    with tracking_server.start(home.folder, port) as server:
        if port is not None and not server.url.endswith(f":{port}"):
            out.print(f"the server of {home.folder} runs already, on another port", soft_wrap=True)
        out.print(f"MLflow: {server.url}  (Ctrl-C ends it)", soft_wrap=True)
        threading.Event().wait()
