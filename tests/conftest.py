"""How the suite is shared between workers: `make test` runs it as `pytest -n 2 --dist loadgroup`.

A file stays on one worker, with the fixtures that it sets up once, and so do the files that share one Ray.
The tests of a file that are long and share nothing may go apart. The longest come first, so that none is left
over at the end. Without `-n` this is only an order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(file_of(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def place(file: str) -> int:
    return next((number for number, prefix in enumerate(LONGEST) if file.startswith(prefix)), len(LONGEST))


def group(item: pytest.Item) -> str:
    file = file_of(item)
    if file.startswith(RAY):
        return RAY
    return item.nodeid if file in APART else file


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()
