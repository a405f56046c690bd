"""A folder in which commands are given: real files and a real store, a cluster and a registry in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from orchestrator.commands.cli import app
from orchestrator.commands.parts import Parts
from orchestrator.home import Home
from orchestrator.store.store import Store
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import FakeCluster, Faults
from tests.orchestrator.recipe_files import finance, fuse, pipeline, support, write_world, write_yaml

PATIENCE = 5.0


class CliWorld:
    """Recipes under `folder`, the home beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_world(folder / "world")
        self.home = Home(folder / "home")
        self.registry: Any = MemoryRegistry(folder / "registry")
        self.faults = Faults()
        self.clusters: list[Any] = []
        self.make_cluster: Callable[[], Any] = lambda: FakeCluster(faults=self.faults)
        self.refuse_registry: Exception | None = None

    # ---- the parts ----

    def parts(self) -> Parts:
        return Parts(
            store=self.open_store,
            server=self.open_server,
            registry=self.open_registry,
            cluster=self.open_cluster,
        )

    @contextmanager
    def open_store(self, home: Home):
        with closing(Store(home.store_url, patience=PATIENCE)) as store:
            yield store

    @contextmanager
    def open_server(self, home: Home):
        if self.refuse_registry:
            raise self.refuse_registry
        yield

    @contextmanager
    def open_registry(self, home: Home):
        if self.refuse_registry:
            raise self.refuse_registry
        (home.folder / "mlflow").mkdir(parents=True, exist_ok=True)
        yield self.registry

    @contextmanager
    def open_cluster(self, home: Home, choice: Any):
        self.clusters.append(self.make_cluster())
        with closing(self.clusters[-1]) as cluster:
            yield cluster

    # ---- files ----

    def two_jobs(self, finance_changes: dict[str, Any] | None = None, **fusion: Any) -> Path:
        """A pipeline of two jobs, fused and released."""
        block = fuse(**{"release": {"out": "release/fused"}, **fusion})
        jobs = (finance(**(finance_changes or {})), support())
        return write_yaml(self.folder / "demo.yaml", pipeline(*jobs, fuse=block))

    def one_job(self, **changes: Any) -> Path:
        return write_yaml(self.folder / "finance.yaml", finance(**changes))

    # ---- commands ----

    def chorus(self, *arguments: Any):
        """Give a command in this home; its result has `exit_code`, `stdout` and `stderr`."""
        home = [] if arguments[0] == "recipe" else ["--home", str(self.home.folder)]
        home += ["--store", self.home.store] if self.home.store else []
        with patch(
            "orchestrator.control.controller.TICK_SECONDS", 0.001
        ):  # nothing here takes time of its own
            return CliRunner().invoke(app, [*map(str, arguments), *home], obj=self.parts())

    def read(self, *arguments: Any) -> Any:
        """What a read command says as JSON."""
        result = self.chorus(*arguments, "-o", "json")
        assert result.stdout, (result.stderr, result.exception)
        return json.loads(result.stdout)

    def statuses(self) -> dict[str, str]:
        with self.open_store(self.home) as store:
            return {job.name: job.status.value for job in store.jobs()}


def assert_one_sentence(result: Any, code: int, *words: str) -> None:
    """The command ended with `code` and said why in one line, which holds `words`."""
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("chorus: ")
    for word in words:
        assert word in lines[0]
