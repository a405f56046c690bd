"""Entry point of `chorus`, and the composition root: it alone knows which parts are the real ones."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from orchestrator.commands.cli import app
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.home import Home

if TYPE_CHECKING:
    from orchestrator.contracts import Cluster, Registry
    from orchestrator.store.store import Store

# Everything heavy is imported by the function that needs it: `chorus --help` must not wait for torch.


def main() -> None:
    """Run one command of the command line and exit with its code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would break the live table
    # Read when torch is imported, here and in the processes of a Ray of our own: idle threads must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="chorus", obj=real_parts())


def real_parts() -> Parts:
    return Parts(store=open_store, server=open_server, registry=open_registry, cluster=open_cluster)


@contextmanager
def open_store(home: Home) -> Generator[Store]:
    from orchestrator.store.store import Store

    with closing(Store(home.store_url)) as store:
        yield store


@contextmanager
def open_server(home: Home) -> Generator[object]:
    from orchestrator.registry import server as tracking_server

    with tracking_server.start(home.folder) as server:
        yield server


@contextmanager
def open_registry(home: Home) -> Generator[Registry]:
    """The registry of a home: its server runs for as long as some command uses it."""
    from orchestrator.registry import server as tracking_server

    with tracking_server.start(home.folder) as server:
        from orchestrator.registry.registry import MlflowRegistry

        yield MlflowRegistry(server.url, lock=home.registry_lock)


@contextmanager
def open_cluster(home: Home, choice: ClusterChoice) -> Generator[Cluster]:
    with closing(_local() if choice.local else _ray(home, choice)) as cluster:
        yield cluster


def _local() -> Cluster:
    from orchestrator.cluster.local import LocalCluster

    return LocalCluster()


def _ray(home: Home, choice: ClusterChoice) -> Cluster:
    from orchestrator.commands.leftovers import HOME_VARIABLE, await_watchers

    await_watchers(home.folder)
    os.environ[HOME_VARIABLE] = str(home.folder)

    from orchestrator.cluster.ray_cluster import RayCluster

    return RayCluster(home.folder, choice.cpus, choice.address)


if __name__ == "__main__":
    main()
