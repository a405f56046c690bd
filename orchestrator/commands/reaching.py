"""Where a command on jobs asks: the home of this machine, or a `chorus api`."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from orchestrator.api.service import HomeService, Service
from orchestrator.commands.parts import Parts
from orchestrator.home import Home


@contextmanager
def reach(parts: Parts, home: Home, server: str | None) -> Generator[Service]:
    """`server` instead of the home, if one is given. Raises BadInput for an address that is none."""
    if server is not None:
        from orchestrator.api.client import TOKEN_VARIABLE, RemoteService

        yield RemoteService(server, os.environ.get(TOKEN_VARIABLE, ""))
        return
    with ExitStack() as stack:
        yield HomeService(home, lambda: stack.enter_context(parts.store(home)), lambda: parts.registry(home))
