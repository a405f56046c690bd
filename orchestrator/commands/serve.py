"""`chorus serve`: the one controller of a home, for all that anybody submits, until it is stopped."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console

from orchestrator import checkpoints
from orchestrator.api import errors
from orchestrator.api.planning import releases_of
from orchestrator.commands.leftovers import remove_unpublished
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.commands.submit import told_of_a_full_disk
from orchestrator.commands.working import work
from orchestrator.home import Home


def serve(parts: Parts, home: Home, choice: ClusterChoice, out: Console) -> int:
    """Work on the queue until Ctrl-C or SIGTERM; the exit code. Raises HomeBusy, BadInput."""
    checkpoints.check()
    with told_of_a_full_disk(home, f"chorus serve{home.flag()}"), ExitStack() as stack:
        stack.enter_context(home.claim())
        store = stack.enter_context(parts.store(home))
        remove_unpublished(home.folder, releases_of(store.unfinished_jobs()), choice.outlives_us)
        out.print(f"working in {home.folder}; Ctrl-C stops, what is done is kept", soft_wrap=True)
        try:
            work(parts, home, store, choice, lambda: None, forever=True)
        except KeyboardInterrupt:
            waiting = len(store.unfinished_jobs())
            out.print(f"stopped; {waiting} jobs are not finished and stay in the queue", soft_wrap=True)
    return errors.OK
