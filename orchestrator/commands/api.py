"""`chorus api`: a home's queue over HTTP until Ctrl-C; beside `chorus serve`, or with nobody at work."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

from rich.console import Console

from orchestrator.api import errors, tokens
from orchestrator.api.service import HomeService
from orchestrator.commands.parts import Parts
from orchestrator.home import Home
from workers.types import BadInput

BACKLOG = 128


def api(parts: Parts, home: Home, host: str, port: int, out: Console) -> int:
    """Answer until Ctrl-C or SIGTERM; the exit code. Raises BadInput without a token, OSError."""
    import uvicorn

    from orchestrator.api.http import Desk, make_app

    if not tokens.any_granted(home.folder):
        raise BadInput(f"nobody could ask: make a token first, by `chorus token NAME{home.folder_flag()}`")
    with _listening(host, port) as listener, parts.store(home) as store:
        app = make_app(
            Desk(
                service=lambda who: HomeService(home, lambda: store, lambda: parts.registry(home), who),
                holder=lambda token: tokens.holder(home.folder, token),
            )
        )
        out.print(f"{home.folder} at http://{_address(listener)} (Ctrl-C ends it)", soft_wrap=True)
        if not _loopback(listener):
            out.print(
                "note: tokens cross the network in the clear; put a proxy with TLS before it", soft_wrap=True
            )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return errors.OK


def _listening(host: str, port: int) -> socket.socket:
    """Raises OSError, named by the address."""
    try:
        return socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), f"{host}:{port}") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"


def _loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
