"""Writers killed while they save a checkpoint or register an adapter, some of them on a disk that fills.

After every kill the newest checkpoint by name must load and must not be older than the last one that was
acknowledged, and every version that the registry shows must download and verify. At the end each registration
that was killed, or found the disk of the server full, is given again and must come to one whole version.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from orchestrator.contracts import RegistryUnreachable
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.processes import forked, killed_after
from tests.contract.samples import fresh_name, new_version, shared_server
from workers import checkpoint
from workers.adapter import Adapter
from workers.checkpoint import Checkpoint, Progress

SIDE = 128
"""Of the square layers that are adapted: 8 layers at rank 16, with two moments, make 400 kB a checkpoint."""
LAYERS = 8
LONGEST_SAVE = 0.12
"""Seconds a writer lives at most: some ten checkpoints."""
REFUSED = "refused"
DISK = 3 * 2**20
"""Bytes: room for six checkpoints, so that the filler decides whether there is any for the next."""
REGISTRY_DISK = 48 * 2**20
"""Bytes, for the home of an MLflow server: its tables, artifacts and log."""
ROOM_LEFT = 400_000
"""Bytes that the filler leaves there at most: some registrations find room, most run out of it on the way."""


def of_step(step: int) -> Checkpoint:
    """Whose every number is its step: a mixture of two would show."""
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": (
            torch.full((16, SIDE), float(step)),
            torch.full((SIDE, 16), float(step)),
        )
        for layer in range(LAYERS)
    }
    size = sum(a.numel() + b.numel() for a, b in factors.values())
    optimizer = {name: torch.full((size,), float(step)) for name in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(Adapter(factors, 16, 16.0), optimizer, Progress(step, 0))


def write_on(folder: Path, acknowledged: Path) -> None:
    """Save step after step from the newest on, until killed. A full disk is tried again, as a host does."""
    newest = checkpoint.newest(folder)
    step = checkpoint.load(newest).progress.step if newest else 0
    told = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        try:
            checkpoint.save(folder, of_step(step + 1), "b" * 64)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            os.write(told, b"full\n")
            continue
        step += 1
        os.write(told, f"{step}\n".encode())


def problem(folder: Path, acknowledged: Path) -> str | None:
    """What is wrong with the newest checkpoint; None if it is whole and new enough."""
    lines = acknowledged.read_text().split() if acknowledged.exists() else []
    told = max((int(line) for line in lines if line != "full"), default=0)
    latest = max(folder.glob("step-*"), default=None)
    if latest is None:
        return f"step {told} was saved and nothing is there" if told else None
    try:
        found = checkpoint.load(latest)
    except Exception as error:
        return f"{latest.name} cannot be loaded: {error}"
    numbers = {float(number) for tensor in found.optimizer.values() for number in tensor.unique()}
    if latest.name != f"step-{found.progress.step:06d}" or numbers != {float(found.progress.step)}:
        return f"{latest.name} holds step {found.progress.step} and numbers {sorted(numbers)}"
    return f"step {told} was saved, {latest.name} is the newest" if found.progress.step < told else None


def kill_savers(folder: Path, chance: random.Random, kills: int, beside: Path | None = None) -> list[str]:
    """The problems found over so many kills. `beside`: a file that takes the rest of the disk, on and off."""
    acknowledged, problems, done = folder.parent.parent / f"{folder.parent.name}.told", [], 0
    folder.mkdir(parents=True, exist_ok=True)
    while done < kills:
        if beside is not None:
            fill(beside, chance.uniform(0.2, 1.0))
        done += killed_after(
            forked(lambda: write_on(folder, acknowledged)), chance.uniform(0.005, LONGEST_SAVE)
        )
        if (found := problem(folder, acknowledged)) is not None:
            problems.append(found)
    return problems


def fill(file: Path, share: float) -> None:
    """Take about that share of the disk, or what is left of it."""
    file.unlink(missing_ok=True)
    with suppress(OSError), file.open("wb", buffering=0) as out:
        for _ in range(int(share * DISK / 2**16)):
            out.write(bytes(2**16))


def fill_but(file: Path, left: int) -> None:
    """Take all of the disk but so many bytes."""
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while out.write(bytes(2**16)):
            pass
    os.truncate(file, max(0, file.stat().st_size - left))


@contextmanager
def small_disk(folder: Path, size: int = DISK) -> Generator[Path | None]:
    """A tmpfs; None where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def kill_registrars(
    url: str, folder: Path, chance: random.Random, kills: int, beside: Path | None = None
) -> tuple[list[str], Counter[str]]:
    """The problems found, and how the versions stood. `beside`: a file that fills the server's disk."""
    registry, problems, stood = MlflowRegistry(url), list[str](), Counter[str]()
    began = time.monotonic()
    registry.register(new_version(registry, folder / "first", fresh_name()))
    longest = 1.5 * (time.monotonic() - began)
    names: list[str] = []
    while stood["killed"] < kills:
        name, place = fresh_name(), folder / str(len(names)) / str(chance.random())
        names.append(name)
        if beside is not None:
            fill_but(beside, chance.randint(0, ROOM_LEFT))
        child = forked(partial(register, url, place, name), folder / "out")
        killed = killed_after(child, chance.uniform(0, longest))
        if beside is not None:
            beside.unlink()
        refused = not killed and (folder / "out").read_text() == REFUSED
        visible = registry.versions(name)
        stood["killed"] += killed
        stood["refused"] += refused
        stood[f"{'killed' if killed else 'refused' if refused else 'done'}, {len(visible)} visible"] += 1
        problems += [text for version in visible if (text := torn(registry, version, place / "seen"))]
    for name in names:
        registry.register(new_version(registry, folder / f"again-{name}", name))
        versions = registry.versions(name)
        if len(versions) != 1 or torn(registry, versions[0], folder / f"whole-{name}"):
            problems.append(f"{name}: given again it has {len(versions)} versions")
    return problems, stood


def register(url: str, folder: Path, name: str) -> None:
    registry = MlflowRegistry(url)
    try:
        registry.register(new_version(registry, folder, name))
    except RegistryUnreachable:  # what a server says that has no room, and what a job waits for
        print(REFUSED, end="")


def torn(registry: MlflowRegistry, version: object, folder: Path) -> str | None:
    """Why a visible version cannot be had; the download verifies its manifest."""
    try:
        registry.download(version, folder)  # type: ignore[arg-type]
    except Exception as error:
        return f"{version}: {error}"
    return None


def case(folder: Path, small: bool, seed: int) -> Outcome:
    chance, began = random.Random(seed), time.monotonic()
    saves, on_full, registrations, on_full_server = (30, 10, 0, 0) if small else (340, 60, 100, 50)
    torch.set_num_threads(1)
    unreadable = kill_savers(folder / "roomy" / "job", chance, saves)
    full, times_full = list[str](), 0
    with small_disk(folder / "small") as disk:
        if disk is not None:
            full = kill_savers(disk / "job", chance, on_full, disk / "filler")
            times_full = (folder / "small.told").read_text().count("full")
    torn_versions, stood = list[str](), Counter[str]()
    torn_on_full, stood_on_full = list[str](), Counter[str]()
    if registrations:  # the suite kills registrars at each of their requests: test_mlflow_killed
        url = shared_server().url
        torn_versions, stood = kill_registrars(url, folder / "register", chance, registrations)
        with small_disk(folder / "server", REGISTRY_DISK) as disk:
            if disk is not None:
                with tracking_server.start(disk) as server:
                    torn_on_full, stood_on_full = kill_registrars(
                        server.url, folder / "register-full", chance, on_full_server, disk / "filler"
                    )
    kills = {
        "saving": saves,
        "saving on a small disk": on_full * bool(times_full),
        "registering": stood["killed"],
        "registering at a server on a small disk": stood_on_full["killed"],
    }
    return Outcome(
        "chaos-saves",
        f"{sum(kills.values())} kills while saving and registering",
        [
            Table("Kills", ("while", "times"), list(kills.items())),
            Table(
                "Problems",
                ("what",),
                [(text,) for text in [*unreadable, *full, *torn_versions, *torn_on_full]] or [("none",)],
            ),
            Table(
                "Else",
                ("what", "how many"),
                [
                    ("saves refused by a full disk", times_full),
                    *((f"registrations {text}", n) for text, n in sorted(stood.items())),
                    *((f"on a small disk {text}", n) for text, n in sorted(stood_on_full.items())),
                ],
            ),
        ],
        [
            Target("kills", sum(kills.values()), 1 if small else 500),
            Target("newest checkpoints unreadable or lost", len(unreadable), 0, at_least=False),
            Target("the same on a disk that fills", len(full), 0, at_least=False),
            Target("saves that a full disk refused", times_full, 1),
            Target("versions half-written or doubled", len(torn_versions), 0, at_least=False),
            Target("the same at a server whose disk fills", len(torn_on_full), 0, at_least=False),
            Target("registrations that a full disk refused", stood_on_full["refused"], 0 if small else 1),
        ],
        Bars({name: float(times) for name, times in kills.items()}, "kills"),
        [f"It took {time.monotonic() - began:.0f} s; seed {seed}."],
    )
