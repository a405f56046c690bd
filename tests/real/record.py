"""`python -m tests.real.record`: run the recipes on real data, and write down what came of it.

Gives `chorus run` (which does nothing twice), reads every figure with `chorus ... -o json`, and writes
`results/YYYY-MM-DD.md`. The data are third parties': none of their rows is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
PIPELINE = HERE / "real.yaml"
DATA = HERE.parents[2] / "shared" / "data"
"""Where the recipes look for the data: beside the project, in no repository."""


@dataclass(frozen=True)
class Floor:
    """A simple baseline's score on the test rows, as the README of the real data states it."""

    metric: str
    value: float
    baseline: str


FLOORS: dict[str, tuple[Floor, ...]] = {
    "real-finance-tweets": (
        Floor("accuracy", 0.656, "majority class"),
        Floor("accuracy", 0.830, "n-gram logistic regression"),
        Floor("macro_f1", 0.759, "n-gram logistic regression"),
    ),
    "real-web-areas": (
        Floor("hit_at_1", 0.561, "popularity"),
        Floor("hit_at_1", 0.664, "item co-occurrence"),
    ),
    "real-travel-choice-zh": (Floor("hit_at_1", 0.335, "popularity"),),
}
"""For dialogues the README states none: there the base's own perplexity is the floor."""
SHOWN = ("perplexity", "rouge_l", "chrf", "accuracy", "macro_f1", "hit_at_1", "ndcg_at_5", "mrr")
LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True)
class Trained:
    """One job as it ended."""

    job: Mapping[str, Any]
    """As `chorus status -o json` shows it."""
    scores: Sequence[Mapping[str, Any]]
    """Of its task: metric, base, adapter."""
    tokens: int
    """Trained on, prompts included."""

    @property
    def minutes(self) -> float:
        """From its first placement to its end; the jobs share one host, so these overlap."""
        return (self.job["finished_at"] - self.job["started_at"]) / 60


# ---- running and reading --------------------------------------------------------------------------------


def chorus(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.main", *arguments, "--home", str(home)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def read(home: Path, *arguments: str) -> Any:
    return json.loads(chorus(home, *arguments, "-o", "json").stdout)


def trained(home: Path) -> list[Trained]:
    """The jobs of the newest run of a home, in order of their recipes."""
    run = read(home, "ps")[0]["run"]
    whole = read(home, "status", run)
    return [_trained(home, job, whole["outcome"]["scores"]) for job in whole["jobs"]]


def _trained(home: Path, job: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> Trained:
    steps = [line for line in read(home, "logs", job["id"]) if line["type"] == "step"]
    own = [score for score in scores if score["task"] == job["task"] and score["metric"] in SHOWN]
    return Trained(job, own, sum(step["tokens"] for step in steps))


# ---- writing --------------------------------------------------------------------------------------------


def record(jobs: Sequence[Trained], command: str, hardware: str, day: str) -> str:
    """The text of one record."""
    rows = [row for job in jobs for row in _rows(job)]
    return "\n".join(
        [
            f"# Real data on the tiny base, {day}",
            "",
            f"Command: `{command}`",
            f"Hardware: {hardware}",
            "",
            "The jobs trained together on one host, so their minutes overlap. Floors are those that the",
            "README of the real data states; where it states none, the base's own score is the floor.",
            "",
            "| task | metric | base | adapter | floor | | tokens | minutes |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _rows(trained: Trained) -> list[str]:
    tokens, minutes = f"{trained.tokens:,}", f"{trained.minutes:.1f}"
    rows: list[str] = []
    for score in trained.scores:
        floors = [f for f in FLOORS.get(score["task"], ()) if f.metric == score["metric"]]
        for floor in floors or [Floor(score["metric"], score["base"], "base")]:
            figures = f"{score['base']:.4g} | {score['adapter']:.4g} | {floor.value:.4g} ({floor.baseline})"
            cells = (score["task"], score["metric"], figures, verdict(score, floor), tokens, minutes)
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def verdict(score: Mapping[str, Any], floor: Floor) -> str:
    """Whether the adapter beats the floor; for perplexity less is better."""
    adapter = score["adapter"]
    if adapter == floor.value:
        return "equal"
    better = adapter < floor.value if score["metric"] in LOWER_IS_BETTER else adapter > floor.value
    return "better than the floor" if better else "**worse than the floor**"


def hardware() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({_processor()}), {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU used"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.real.record", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".chorus-real"), help="kept, and gone on with")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--local", action="store_true", help="without Ray")
    given = parser.parse_args(arguments)
    flags = ["--local"] if given.local else []
    run = [sys.executable, "-m", "orchestrator.main", "run", str(given.pipeline), *flags]
    done = subprocess.run([*run, "--home", str(given.home)], check=False)
    if done.returncode:
        return done.returncode
    day = datetime.now(UTC).date().isoformat()
    command = " ".join(["chorus run", f"tests/real/{given.pipeline.name}", *flags])
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{day}.md"
    file.write_text(record(trained(given.home), command, hardware(), day))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
