"""What a command works with, as functions that make it: `main` gives the real ones, a test its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.home import Home

if TYPE_CHECKING:
    from orchestrator.contracts import Cluster, Registry
    from orchestrator.store.store import Store


@dataclass(frozen=True)
class ClusterChoice:
    """Which cluster: this process, a Ray of our own, or a Ray that exists."""

    local: bool = False
    cpus: int | None = None
    """CPUs that a Ray of our own gives out; None for all of the machine's."""
    address: str | None = None


@dataclass(frozen=True)
class Parts:
    """Each is made when a command first needs it, and let go at its end."""

    store: Callable[[Home], AbstractContextManager[Store]]
    server: Callable[[Home], AbstractContextManager[object]]
    """The registry's server, started and held, nothing heavy imported: for a thread beside other work."""
    registry: Callable[[Home], AbstractContextManager[Registry]]
    cluster: Callable[[Home, ClusterChoice], AbstractContextManager[Cluster]]
