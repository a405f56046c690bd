"""Every benchmark runs at the smallest shape and writes its record. Nothing here looks at a time.

Benchmarks are run by hand, and so are these: with CHORUS_BENCH=1, in two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.bench.__main__ import CASES, ENVIRONMENT, parser, record
from tests.bench.measure import Skipped
from tests.bench.record import Bars, Machine, Outcome, Table, Target, write

by_hand = pytest.mark.skipif("CHORUS_BENCH" not in os.environ, reason="CHORUS_BENCH=1 tries the benchmarks")
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _threads():
    """A benchmark sets one thread for its process; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_record(path, case):
    text = path.read_text()
    picture = path.with_suffix(".png")
    assert text.startswith("# ")
    assert "A trial at a small shape" in text
    assert f"tests.bench {case}" in text or case.startswith("gpu")
    assert "nan" not in text
    assert picture.read_bytes().startswith(PNG)
    assert picture.stat().st_size < 100_000


@by_hand
@pytest.mark.parametrize("case", CASES)
def test_bench_case_small_writes_a_record(case, tmp_path):
    asked = parser().parse_args([case, "--small", "--rounds", "1", "--out", str(tmp_path)])
    try:
        path = record(case, asked, command=["python", "-m", "tests.bench", case])
    except Skipped as reason:
        pytest.skip(str(reason))
    assert path.name.endswith(f"-{case}.md")
    check_record(path, case)


@by_hand
def test_bench_gpu_script_on_the_cpu_writes_four_records(tmp_path):
    # A process of its own: it joins a group of one rank, which the other tests must not meet.
    command = [sys.executable, "-m", "tests.bench.gpu", "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = sorted(tmp_path.glob("*.md"))
    assert [path.stem.split("-gpu-")[1] for path in records] == [
        "check",
        "offload",
        "saturated",
        "underfilled",
    ]
    for path in records:
        check_record(path, "gpu")


def test_record_names_the_missed_target_and_keeps_an_earlier_record(tmp_path):
    targets = [Target("speed", 3.0, 4.0), Target("memory", 1.0, 1.1, at_least=False)]
    outcome = Outcome("case", "A case", [Table("t", ("a",), [[1]])], targets, Bars({"a": 1.0}, "s"))
    machine = Machine("a processor", 2, 4.0, (0.0, 0.0, 0.0))
    first = write(outcome, machine, tmp_path, ["x"], small=False)
    second = write(outcome, machine, tmp_path, ["x"], small=False)
    assert first != second
    assert "Missed: speed." in first.read_text()
    assert "| speed | >= 4 | 3 | **no** |" in first.read_text()
    assert "| memory | <= 1.1 | 1 | yes |" in first.read_text()
