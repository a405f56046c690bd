"""`chorus doctor`: what this machine lacks. Imports no dependency that could be the missing one."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator import checkpoints
from orchestrator.commands.output import grid
from workers.types import CheckpointsAway

if TYPE_CHECKING:
    from rich.console import Console

DISTRIBUTION = "chorus-lora"
PYTHON = (3, 11)
MEMORY_BYTES = 4 * 2**30
DISK_BYTES = 2 * 2**30
SHARED_MEMORY_BYTES = 128 * 2**20
"""What Ray's object store of a local cluster takes, and some room."""


@dataclass(frozen=True)
class Check:
    """One thing looked at. `todo` says what to do when it is not there."""

    what: str
    state: Literal["ok", "missing", "optional"]
    found: str
    todo: str = ""

    @property
    def ok(self) -> bool:
        return self.state != "missing"


def checks(home: Path) -> list[Check]:
    """Everything that chorus needs or can use, as it is on this machine."""
    return [
        _python(),
        *_packages(),
        _cores(),
        _memory(),
        _disk(home),
        *_checkpoints(),
        _shared_memory(),
        _loopback(),
        _compiler(),
        _gpu(),
        _chromium(),
    ]


def to_json(found: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in found]


def print_checks(out: Console, found: list[Check]) -> None:
    rows = [(check.what, check.state, check.found, check.todo) for check in found]
    out.print(grid(("what", "state", "found", "what to do"), rows))
    missing = [check.what for check in found if not check.ok]
    out.print(f"missing: {', '.join(missing)}" if missing else "nothing that is needed is missing")


def _check(what: str, good: bool, found: str, todo: str, *, optional: bool = False) -> Check:
    if good:
        return Check(what, "ok", found)
    return Check(what, "optional" if optional else "missing", found, todo)


# ---- software -------------------------------------------------------------------------------------------


def _python() -> Check:
    wanted = ".".join(map(str, PYTHON))
    good = sys.version_info[:2] >= PYTHON
    return _check("Python", good, platform.python_version(), f"install Python {wanted} or newer")


def _packages() -> Iterator[Check]:
    """Every dependency of chorus against its own pins."""
    try:
        from packaging.requirements import Requirement

        lines = requires(DISTRIBUTION) or []
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        yield Check(DISTRIBUTION, "missing", str(error), "install it: make .venv/installed")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement.name, str(requirement.specifier), requirement.specifier)


def _package(name: str, wanted: str, specifier: Any) -> Check:
    todo = f"pip install -c constraints.txt '{name}{wanted}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "missing", "not installed", todo)
    return _check(name, specifier.contains(found, prereleases=True), found, f"{wanted} is wanted: {todo}")


# ---- machine --------------------------------------------------------------------------------------------


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    todo = "two ranks need two; with one, use --local or --cpus 2"
    return _check("cores", cores >= 2, str(cores), todo, optional=True)


def _memory() -> Check:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _check("memory", size >= MEMORY_BYTES, _gigabytes(size), f"{_gigabytes(MEMORY_BYTES)} are needed")


def _disk(home: Path) -> Check:
    """Space where the home is or would be, and whether one may write there."""
    folder = next(path for path in (home, *home.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Check("disk", "missing", f"{folder} cannot be written to", "choose another --home")
    todo = f"{_gigabytes(DISK_BYTES)} are needed: free some, or choose another --home"
    return _check("disk", free >= DISK_BYTES, f"{_gigabytes(free)} free in {folder}", todo)


def _checkpoints() -> Iterator[Check]:
    """The object store of checkpoints, if one is named."""
    if not checkpoints.named():
        return
    what = checkpoints.VARIABLE
    try:
        found = checkpoints.trouble()
    except ModuleNotFoundError as error:
        yield Check(what, "missing", "cannot be used", f"{error.name} is not installed")
    except CheckpointsAway as error:
        yield Check(what, "missing", "does not answer", f"see whether it is up, or correct it: {error}")
    else:
        yield _check(what, found is None, "cannot be used" if found else "can be used", found or "")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "optional", "not there", "Ray will use /tmp, which is slower")
    size = shutil.disk_usage(folder).free
    todo = "Ray will use /tmp, which is slower; in Docker: --shm-size=1g"
    return _check("/dev/shm", size >= SHARED_MEMORY_BYTES, f"{_gigabytes(size)} free", todo, optional=True)


def _loopback() -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Check("loopback", "missing", str(error), "MLflow and Ray need ports on 127.0.0.1")
    return Check("loopback", "ok", "a port can be bound")


def _compiler() -> Check:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return _check("compiler", found is not None, found or "none", "nothing here needs one", optional=True)


def _gpu() -> Check:
    program = shutil.which("nvidia-smi")
    lines = _lines([program, "-L"]) if program else []
    todo = "training runs on CPUs; for a GPU install its driver and the extra 'gpu'"
    return _check("GPU", bool(lines), ", ".join(lines) or "none", todo, optional=True)


def _lines(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _chromium() -> Check:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    todo = "only the test of the MLflow page needs it: apt-get install chromium chromium-driver"
    return _check("chromium", found is not None, found or "none", todo, optional=True)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
