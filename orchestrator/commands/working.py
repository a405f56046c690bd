"""To be the controller of a home for a while: its cluster, its registry, its log, its signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from orchestrator import checkpoints
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.contracts import Cluster
from orchestrator.control.controller import Controller
from orchestrator.home import Home
from orchestrator.store.store import Store

STORE_PATIENCE = 600.0
"""Seconds a controller waits for a store that is away: its hosts train on meanwhile."""


def work(
    parts: Parts,
    home: Home,
    store: Store,
    choice: ClusterChoice,
    on_tick: Callable[[], None],
    *,
    only: str | None = None,
    until: str | None = None,
    forever: bool = False,
) -> None:
    """Run the store's jobs (those of run `only`) until all, or those of run `until`, have finished.

    Ctrl-C and SIGTERM end it in order, as KeyboardInterrupt. Claim the home before.
    """
    with _log_to(home.log), _terminated_like_interrupted(), ExitStack() as stack:
        store.wait_for_it(STORE_PATIENCE)
        cluster = stack.enter_context(_beside_the_server(parts, home, choice))
        registry = stack.enter_context(parts.registry(home))
        controller = Controller(store, cluster, registry, home.folder, only, checkpoints=checkpoints.named())
        controller.run(on_tick=on_tick, until=until, forever=forever)


@contextmanager
def _beside_the_server(parts: Parts, home: Home, choice: ClusterChoice) -> Generator[Cluster]:
    """The cluster, with the registry's server started meanwhile: each takes seconds.

    Ray wants the thread that lives on, so the server has the other one. An error of either ends both.
    """
    with ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool:
            server = pool.submit(stack.enter_context, parts.server(home))
            cluster = stack.enter_context(parts.cluster(home, choice))
            server.result()
        yield cluster


@contextmanager
def _log_to(file: Path) -> Generator[None]:
    """Send what is logged to the home's log: on the screen it would break the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _QuietFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        handler.close()


class _QuietFile(logging.FileHandler):
    """A log on a full disk loses lines; it must not print tracebacks between those of the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _terminated_like_interrupted() -> Generator[None]:
    """SIGTERM ends the run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
