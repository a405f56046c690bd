"""The memory model: a line that no measured peak lies above, and what it lets in."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers import memory
from workers.memory import Peaks, adapter_room, is_out_of_memory, pass_room, upper_line, worst
from workers.types import MemoryModel

GIB = 1 << 30
ADAPTER = 2 * GIB // 16
"""Parameters that take 2 GiB."""
MODEL = MemoryModel(limit_bytes=10 * GIB, fixed_bytes=4 * GIB, bytes_per_token=1e6, bytes_per_parameter=16)


@given(st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 10**11)), min_size=1, max_size=8))
def test_upper_line_has_no_point_above_it_and_does_not_fall(points):
    slope, intercept = upper_line(points)
    assert slope >= 0
    assert all(peak <= intercept + slope * tokens + 1 for tokens, peak in points)


def peaks_of(monkeypatch, peaks: list[tuple[int, int, int]]) -> Peaks:
    """After passes of (tokens, adapter parameters, peak bytes)."""
    found = Peaks(bytes_per_parameter=16)
    for tokens, parameters, peak in peaks:
        monkeypatch.setattr(memory, "peak_bytes", lambda peak=peak: peak)
        found.seen(tokens, parameters)
    return found


def test_peaks_of_a_known_host_give_its_model(monkeypatch):
    """fixed 1 GB, 16 bytes a parameter, 2,000 a token; loading left more behind than that."""
    truth = [(n, p, 10**9 + 16 * p + 2000 * n) for n, p in ((512, 0), (1024, 10**6), (4096, 10**7))]
    model = peaks_of(monkeypatch, [(0, 0, 9 * 10**8), *truth]).fit(GIB)
    assert model == MemoryModel(GIB, 10**9, 2000.0, 16)


def test_peaks_of_passes_that_are_alike_use_the_loaded_base_for_a_slope(monkeypatch):
    model = peaks_of(monkeypatch, [(0, 0, 10**9), (1000, 0, 10**9 + 10**6)]).fit(GIB)
    assert model == MemoryModel(GIB, 10**9, 1000.0, 16)


def test_peaks_a_smaller_pass_after_a_larger_one_says_nothing(monkeypatch):
    """The peak is still the larger one's."""
    found = peaks_of(monkeypatch, [(0, 0, 100), (1000, 0, 5000), (10, 0, 5000)])
    assert found.samples == {0: 100, 1000: 5000}


def ticks_of(monkeypatch, ticks: list[tuple[int, int]], forgets: bool) -> Peaks:
    """After ticks of (tokens, adapters) on a host that holds 10 GiB, 2 an adapter and 1 for 4,096 tokens."""
    highest = [10 * GIB]
    monkeypatch.setattr(memory, "peak_bytes", lambda: highest[0])
    monkeypatch.setattr(
        memory, "forget_peak", lambda: highest.__setitem__(0, 10 * GIB * forgets or highest[0])
    )
    found = Peaks(bytes_per_parameter=16)
    found.seen(0, 0)
    for tokens, adapters in ticks:
        found.begin()
        highest[0] = max(highest[0], (10 + 2 * adapters) * GIB + tokens * GIB // 4096)
        found.seen(tokens, adapters * ADAPTER)
    return found


@pytest.mark.parametrize("forgets", [True, False])
def test_peaks_after_residents_have_left_do_not_hold_what_those_held(monkeypatch, forgets):
    """Also where the system does not forget a peak."""
    full = ticks_of(monkeypatch, [(1024, 1), (4096, 8)], forgets).fit(32 * GIB)
    left = ticks_of(monkeypatch, [(1024, 1), (4096, 8), (4096, 1), (512, 1), (4096, 2)], forgets).fit(
        32 * GIB
    )
    assert full == left == MemoryModel(32 * GIB, 10 * GIB, GIB / 4096, 16)


def test_peaks_of_larger_passes_after_residents_have_left_are_their_own(monkeypatch):
    model = ticks_of(monkeypatch, [(1024, 8), (4096, 1)], True).fit(32 * GIB)
    assert model == MemoryModel(32 * GIB, 10 * GIB, GIB / 4096, 16)


def test_peaks_of_equal_passes_keep_the_highest(monkeypatch):
    """As many tokens may lie in more or in fewer passes, or in rows of other lengths."""
    found = peaks_of(monkeypatch, [(1000, 10, 5000), (1000, 100, 6000), (1000, 10, 4000)])
    assert found.samples == {1000: 5000 - 160}


def test_peaks_without_a_pass_or_without_figures_of_the_system_are_no_model(monkeypatch):
    assert peaks_of(monkeypatch, [(0, 0, 10**9)]).fit(GIB) is None
    assert peaks_of(monkeypatch, [(0, 0, 0), (64, 0, 0)]).fit(GIB) is None


def test_adapter_room_and_pass_room_fill_nine_tenths_of_the_limit_together():
    tokens = 2000
    parameters = adapter_room(MODEL, tokens)
    used = MODEL.fixed_bytes + 16 * parameters + MODEL.bytes_per_token * tokens
    assert 0.9 * MODEL.limit_bytes - used < 16
    assert pass_room(MODEL, parameters) in (tokens - 1, tokens)
    assert adapter_room(MODEL, 10**6) == 0
    assert pass_room(MODEL, 10**9) == 0


def test_worst_of_two_ranks_holds_for_both():
    other = MemoryModel(8 * GIB, 3 * GIB, 2e6, 16)
    assert worst([MODEL, other]) == MemoryModel(8 * GIB, 4 * GIB, 2e6, 16)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_is_out_of_memory_knows_the_errors_of_allocators(error, expected):
    assert is_out_of_memory(error) is expected


def test_is_out_of_memory_knows_what_torch_says_on_this_cpu():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_free_bytes_is_the_control_groups_where_that_is_less(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() == 5000 * 1024


@pytest.mark.parametrize(
    ("most", "used", "cache"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_bytes_counts_cached_files_that_nobody_uses_as_free(monkeypatch, tmp_path, most, used, cache):
    (tmp_path / "memory").mkdir()
    (tmp_path / most).write_text("16000000\n")
    (tmp_path / used).write_text("15900000\n")
    stat = (tmp_path / most).with_name("memory.stat")
    stat.write_text(f"anon 6000000\nfile 9900000\nactive_file 1\nold_{cache} 5\n{cache} 9000000\n")
    (tmp_path / "meminfo").write_text("MemAvailable:    50000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes() == 9_100_000
    stat.write_text(f"{cache} 99000000\n")  # read a moment after the other
    assert memory.free_bytes() == 16_000_000


KEPT = """
import resource, sys, torch
from workers.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def take_and_free():
    _ = [torch.ones(2**21) for _ in range(8)]
take_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):  # aligned blocks leave gaps: now and then a pass needs one block more than before
    take_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 32 * 8 * 2**23 // resource.getpagesize()
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Fixes glibc's threshold, which else rises by itself after the first large block is freed."""


def faults(how: str) -> int:
    """Pages that 32 passes of 64 MiB fault in anew after a first one, in a process of its own."""
    command = [sys.executable, "-c", KEPT, how]
    environment = {**os.environ, **GIVEN_BACK} if how == "given back" else None
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_freed_memory_that_is_kept_is_not_faulted_in_again():
    assert faults("given back") > 0.9 * PAGES
    assert faults("kept") < 0.1 * PAGES
