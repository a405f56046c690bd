"""The long run of the state machine: in parts, each with a seed, and a dated record of all of them.

python -m tests.orchestrator.machine 10000 --out tests/bench/results
python -m tests.orchestrator.machine 5000 --seed 1 --parts FILE        in two processes at once, and then
python -m tests.orchestrator.machine 0 --parts FILE --out tests/bench/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.record import Bars, Machine, Outcome, Table, Target, write
from tests.orchestrator import machine

WANTED = 10_000
RECORD = "machine"


def main() -> None:
    asked = parser().parse_args()
    parts = _read(asked.parts)
    if asked.sequences:
        start = time.monotonic()
        found = machine.check(asked.sequences, seed=asked.seed)
        seconds = time.monotonic() - start
        part = {"seed": asked.seed, "commit": _commit(), "seconds": seconds, "contents": found}
        parts.append(part)
        print(f"{asked.sequences} sequences, no invariant broken, {seconds:.0f} s")
        if asked.parts is not None:
            with asked.parts.open("a") as file:
                file.write(json.dumps(part) + "\n")
    if asked.out is not None:
        path = write(
            outcome(parts), Machine.read(), asked.out, ["python", "-m", *_command(parts)], small=False
        )
        print(path.read_text())


def outcome(parts: Sequence[dict[str, Any]]) -> Outcome:
    """A record is written of sequences that broke nothing: a part that did has raised."""
    contents: Counter[str] = Counter()
    for part in parts:
        contents.update(part["contents"])
    sequences = contents.pop("sequences")
    rows = [(name, f"{count:,}", f"{count / sequences:.2f}") for name, count in sorted(contents.items())]
    each = [
        (part["seed"], part["commit"], f"{part['contents']['sequences']:,}", f"{part['seconds']:.0f}")
        for part in parts
    ]
    return Outcome(
        RECORD,
        f"{sequences:,} sequences of events over controller, scheduler and store: no invariant broken",
        [
            Table("What the sequences contained", ("what", "times", "a sequence"), rows),
            Table("Parts", ("seed", "commit", "sequences", "seconds"), each),
        ],
        [Target("sequences without a broken invariant", sequences, WANTED)],
        Bars({name: count for name, count in contents.items() if count < 1e6}, "times"),
        [INVARIANTS],
    )


INVARIANTS = """**What held after every event**: no rank is given twice; a gang is whole or absent; a job has
one state and one seat; attempts only go up, what has ended stays so, and a stale attempt changes nothing; the
controller's memory is as the store, and as the store after a crash; what gets free goes to who has waited to
the bound. At the end of each sequence faults stop, and every job that is not cancelled or refused gets to its
end."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.orchestrator.machine")
    parser.add_argument("sequences", type=int, help="0: only write the record of the parts")
    parser.add_argument("--seed", type=int, help="of this part; left out, hypothesis draws one")
    parser.add_argument("--parts", type=Path, help="file that each part adds its line to")
    parser.add_argument("--out", type=Path, help="folder for a record of all parts")
    return parser


def _commit() -> str:
    """Of the code that ran; empty outside a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _command(parts: Sequence[dict[str, Any]]) -> list[str]:
    if len(parts) == 1 and parts[0]["seed"] is None:
        return ["tests.orchestrator.machine", str(parts[0]["contents"]["sequences"])]
    asked = "COUNT --seed N --parts FILE, for each part; then 0 --parts FILE --out FOLDER"
    return ["tests.orchestrator.machine", asked]
