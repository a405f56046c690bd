"""The processes of `tests.chaos.registry`: writers register versions, promoters fight over champions.

Each waits while the server does not answer and asks the same again, as a job and a person do; what it was
told goes, a line at a time, into a file that the checks read.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.contracts import NoSuchVersion, Registry, RegistryConflict, RegistryUnreachable
from orchestrator.registry.registry import MlflowRegistry
from tests.contract.samples import new_version
from workers.manifest import folder_digest

WRITERS, PROMOTERS = "writer-*.jsonl", "promoter-*.jsonl"
PATIENCE = 300.0
"""Seconds after which a server that does not answer is no longer waited for."""
TURN = 3.0
"""Seconds that all promoters spend on one name before they go to the next, so that they meet."""
LOCKED = "locked"
"""Begins the names that are moved under the lock of one home."""
MADE, TOLD, NOTHING, ALREADY = "made", "told", "nothing to go back to", "champion already"


def answered(call: Callable[[], Any], met: Counter[str]) -> Any:
    """What the call returns, or raises, once the server answers; `met` counts how often it did not."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except RegistryUnreachable:
            if time.monotonic() > deadline:
                raise
            met["unanswered"] += 1
            time.sleep(0.2)


def tell(file: Path, **line: Any) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def told(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The lines of all files; one that is just being written is left out."""
    for file in sorted(folder.glob(pattern)):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


# ---- writers --------------------------------------------------------------------------------------------


def write(url: str, folder: Path, writer: int, names: Sequence[str], count: int) -> None:
    """Register so many versions, each of a step and bytes of its own, in turn under each name."""
    registry, file = MlflowRegistry(url), folder / f"writer-{writer}.jsonl"
    for place in range(count):
        name, step = names[(writer + place) % len(names)], f"w{writer}-{place}"
        began, met = time.monotonic(), Counter[str]()
        registration = Registration(registry, folder / step, name, step, writer * count + place)
        version = answered(registration, met)
        shutil.rmtree(folder / step)
        tell(
            file,
            name=name,
            step=step,
            version=version.version,
            digest=version.digest,
            unanswered=met["unanswered"],
            seconds=time.monotonic() - began,
        )


class Registration:
    """One version, given again and again with the same bytes, in a folder anew each time."""

    def __init__(self, registry: Registry, folder: Path, name: str, step: str, seed: int) -> None:
        self._registry, self._folder, self._name, self._step = registry, folder, name, step
        self._seed, self._tries = seed, 0

    def __call__(self) -> Any:
        self._tries += 1
        new = new_version(self._registry, self._folder / str(self._tries), self._name, self._step, self._seed)
        version = self._registry.register(new)
        assert version.digest == folder_digest(new.adapter_dir)
        self._registry.set_alias(self._name, "candidate", version.version)
        return version


# ---- promoters ------------------------------------------------------------------------------------------


def fight(
    url: str, lock: Path, folder: Path, promoter: int, names: Sequence[str], seed: int, stop: Path
) -> None:
    """Promote and roll back until `stop` appears. No two promoters want the same version."""
    locked, unlocked, chance = MlflowRegistry(url, lock), MlflowRegistry(url), random.Random(seed)
    file, number = folder / f"promoter-{promoter}.jsonl", 0
    while not stop.exists():
        name = names[int(time.time() / TURN) % len(names)]
        wanted = [
            line["version"]
            for line in told(folder, WRITERS)
            if line["name"] == name and line["version"] % 2 == promoter % 2
        ]
        if not wanted:
            time.sleep(0.2)
            continue
        number += 1
        registry = locked if name.startswith(LOCKED) else unlocked
        target = None if chance.random() < 0.3 else chance.choice(wanted[-20:])
        tell(file, **_one_move(registry, name, target, f"p{promoter}-{number}"))
        time.sleep(chance.uniform(0.0, 0.3))


def _one_move(registry: Registry, name: str, target: int | None, reason: str) -> dict[str, Any]:
    """`target` None rolls back. The champion is looked up first, as a command does."""
    met = Counter[str]()
    champion = answered(lambda: _champion(registry, name), met)
    met.clear()
    time.sleep(0.05)  # a person looks at it

    def move() -> Any:
        if target is None:
            return registry.rollback(name, champion, reason)
        return registry.promote(name, target, champion, reason, {"macro_f1": target / 1000})

    try:
        after = answered(move, met)
        outcome = ALREADY if target == champion else MADE
        assert target in (None, after.version), (target, after.version)
    except RegistryConflict:
        outcome = TOLD
    except NoSuchVersion:
        outcome = NOTHING
    return {
        "name": name,
        "kind": "rollback" if target is None else "promote",
        "reason": reason,
        "champion": champion,
        "target": target,
        "outcome": outcome,
        "unanswered": met["unanswered"],
    }


def _champion(registry: Registry, name: str) -> int | None:
    try:
        return registry.version(name, "champion").version
    except NoSuchVersion:
        return None
