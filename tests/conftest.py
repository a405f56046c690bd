"""How the suite is shared between workers: `make test` runs it as `pytest -n 2 --dist loadscope`.

A file stays on one worker, with the fixtures that it sets up once, and so do the files that share one Ray.
The tests of a file that are long and share nothing may go apart. The longest come first, so that none is left
over at the end. Without `-n` this is only an order.

pytest-xdist 3.8's own groups (`--dist loadgroup`) have no effect with pytest 9.2, which no longer reads the
attribute by which they are told; so the scheduler is told here which tests go together.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from orchestrator.collector import without_collector

LONGEST = (
    "integration/test_run_killed.py",
    "integration/test_run_disk_full.py",
    "integration/test_run_distilled.py",
    "integration/test_cluster",
    "integration/",
    "numerics/test_parity_matrix.py",
    "numerics/",
)
"""Prefixes, in the order of the suite; everything else comes after them."""
APART = (
    "integration/test_run_killed.py",
    "integration/test_run_disk_full.py",
    "integration/test_mlflow_server.py",
)
RAY = "integration/test_cluster"


@pytest.fixture(scope="session")
def s3():
    """A server, found by every process that is started from here."""
    # Here: few tests need what it imports.
    from tests.s3 import S3

    with pytest.MonkeyPatch.context() as patch:
        server = S3()
        for name, value in server.settings.items():
            patch.setenv(name, value)
        yield server
        server.close()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported stays: to look through it for garbage takes a fifth of the time."""
    with without_collector():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(file_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


def place(file: str) -> int:
    return next((number for number, prefix in enumerate(LONGEST) if file.startswith(prefix)), len(LONGEST))


def group(nodeid: str) -> str:
    file = file_of(nodeid)
    if file.startswith(RAY):
        return RAY
    return nodeid if file in APART else file


def file_of(nodeid: str) -> str:
    """Below `tests/`."""
    return nodeid.partition("::")[0].removeprefix("tests/")
