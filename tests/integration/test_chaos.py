"""The chaos cases at the size of a suite; `python -m tests.chaos CASE` runs them whole and keeps a record."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.postgres import require

CASES = ("submissions", "saves", "draws", "registry")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """In a process of its own: the cases fork, and this one has threads."""
    require()
    folder = tmp_path_factory.mktemp("records")
    command = [sys.executable, "-m", "tests.chaos", *CASES, "--small", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return {case: next(folder.glob(f"*-chaos-{case}*.md")).read_text() for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_chaos_at_the_size_of_a_suite_finds_nothing_lost_and_nothing_doubled(records, case):
    targets = [line for line in records[case].splitlines() if line.startswith("| ") and "=" in line]
    assert len(targets) >= 5
    assert all(line.endswith("| yes |") for line in targets), records[case]
