"""Run benchmarks by hand, each in a process of its own, and write a dated record and a plot of each.

    python -m tests.bench                     all cases
    python -m tests.bench ticks memory        some of them
    python -m tests.bench --small --out DIR   everything at a small shape, to try the scripts

Nothing else should run on the machine. The exit code is 0 when the records are written, whatever they say.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CASES = (
    "ticks",
    "tokens",
    "residents",
    "bytes",
    "joins",
    "memory",
    "operators",
    "jobs",
    "controller",
    "release",
    "philly",
    "decision",
    "packing",
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""A rank has one thread, in the benchmarks as on a host."""


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    cases = asked.cases or list(CASES)
    if len(cases) == 1 and asked.here:
        from tests.bench.measure import Skipped

        try:
            record(cases[0], asked, _command(asked, cases[0]))
        except Skipped as reason:
            print(f"{cases[0]}: skipped: {reason}")
        return 0
    return max(_in_a_process(case, arguments, asked.cases) for case in cases)


def _in_a_process(case: str, arguments: Sequence[str], named: Sequence[str]) -> int:
    options = [argument for argument in arguments if argument not in named]
    command = [sys.executable, "-m", "tests.bench", case, *options, "--here"]
    return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode


def record(case: str, asked: argparse.Namespace, command: Sequence[str]) -> Path:
    """Measure one case in this process and write its record."""
    import torch

    from tests.bench.measure import Setting
    from tests.bench.record import Machine, write

    machine = Machine.read()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rounds = asked.rounds or (2 if asked.small else 5)
        setting = Setting(Path(folder), asked.small, rounds, asked.arithmetic)
        outcome = _case(case)(setting)
    if asked.arithmetic != "exact":
        title = f"{outcome.title}: {asked.arithmetic} arithmetic"
        outcome = replace(outcome, case=f"{case}-{asked.arithmetic}", title=title)
    path = write(outcome, machine, asked.out, command, asked.small)
    print(path.read_text())
    print(f"written: {path}")
    return path


def _case(name: str) -> Callable:
    # Each imports what it measures: the memory of one case must not hold what another needs.
    if name in ("ticks", "tokens", "residents"):
        from tests.bench import ticks

        return {"ticks": ticks.points, "tokens": ticks.tokens_curve, "residents": ticks.residents_curve}[name]
    if name == "bytes":
        from tests.bench.gathers import bytes_gathered

        return bytes_gathered
    if name == "joins":
        from tests.bench.joins import joins

        return joins
    if name == "memory":
        from tests.bench.memory import memory

        return memory
    if name == "release":
        from tests.bench.release import release

        return release
    if name == "operators":
        from tests.bench.operators import operators

        return operators
    if name == "packing":
        from tests.bench.packing import packing

        return packing
    if name in ("philly", "decision"):
        from tests.bench import policy

        return {"philly": policy.philly, "decision": policy.decision}[name]
    if name == "controller":
        from tests.bench.controller import controller

        return controller
    from tests.bench.jobs import jobs

    return jobs


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--small", action="store_true", help="a tiny base and few tokens: tries the scripts")
    parser.add_argument("--rounds", type=int, help="5 unless given, 2 if small")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--arithmetic", choices=["exact", "fused"], default="exact", help="of the host")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def _command(asked: argparse.Namespace, case: str) -> list[str]:
    options = ["--small"] if asked.small else []
    options += ["--rounds", str(asked.rounds)] if asked.rounds else []
    options += ["--arithmetic", asked.arithmetic] if asked.arithmetic != "exact" else []
    return ["python", "-m", "tests.bench", case, *options]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
