"""Run chaos cases by hand and write a dated record and a plot of it under `tests/bench/results`.

    python -m tests.chaos submissions              1,000 submissions, at least 200 kills
    python -m tests.chaos saves                    500 kills while saving and registering, a disk that fills
    python -m tests.chaos draws                    100,000 draws, 50 crashes
    python -m tests.chaos ranks                    100 ranks killed and stopped, on several raylets; or
        --times 25 --parts FILE                    in parts, each added to what the file holds
    python -m tests.chaos nodes                    raylets killed under two hosts; the head killed
    python -m tests.chaos controllers              controllers killed over a host in training
    python -m tests.chaos registry                 8 writers of 200 versions (--times), 2 promoters,
                                                   the MLflow server killed twice; --postgres
    python -m tests.chaos tracking                 the MLflow server stopped for 600 s (--times: seconds)

`--small` is the size that the suite runs. The exit code is 0 when the record is written, whatever it says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from tests.bench.record import Machine, Outcome, write

RESULTS = Path(__file__).parents[1] / "bench" / "results"
CASES = ("submissions", "saves", "draws", "ranks", "nodes", "controllers", "registry", "tracking")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--small", action="store_true", help="as the suite runs it")
    parser.add_argument("--times", type=int, help="see the case: kills, seconds or versions")
    parser.add_argument("--parts", type=Path, help="ranks: a file; this run is added, the record is of all")
    parser.add_argument("--postgres", action="store_true", default=None, help="registry: not on SQLite")
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    asked = parser.parse_args(arguments)
    for name in asked.cases:
        machine = Machine.read()
        case: Callable[..., Outcome] = import_module(f"tests.chaos.{name}").case
        options = {
            key: value for key in ("times", "parts", "postgres") if (value := getattr(asked, key)) is not None
        }
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            outcome = case(Path(folder), small=asked.small, seed=asked.seed, **options)
        elsewhere = {*asked.cases, "--out", str(asked.out), "--parts", str(asked.parts)}
        options_given = [word for word in arguments if word not in elsewhere]
        command = ["python", "-m", "tests.chaos", name, *options_given]
        path = write(outcome, machine, asked.out, command, asked.small)
        print(path.read_text())
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
