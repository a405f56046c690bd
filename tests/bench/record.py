"""A dated record of one case: what was measured, on what, by which command, which target was missed.

`<date>-<case>.md` and a plot beside it. A second record of one day gets a number: none is overwritten.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "mlflow")


@dataclass(frozen=True)
class Target:
    """One line of the issue's table. Met if `found` is at least (or at most) `bound`."""

    what: str
    found: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    @property
    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "yes" if self.met else "**no**"
        return f"| {self.what} | {sign} {self.bound:.4g} | {self.found:.4g} | {verdict} |"


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def text(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(
            [f"**{self.title}**", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]
        )


@dataclass(frozen=True)
class Lines:
    """Curves over one axis, both logarithmic."""

    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    labels: tuple[str, str]
    height = 3.6

    def draw(self, axes: Any) -> None:
        for name, values in self.series.items():
            axes.plot(self.x, values, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=self.labels[0], ylabel=self.labels[1])
        axes.set_xticks(self.x, [f"{value:g}" for value in self.x])
        axes.minorticks_off()
        axes.legend(frameon=False)


@dataclass(frozen=True)
class Bars:
    series: Mapping[str, float]
    label: str

    @property
    def height(self) -> float:
        """Inches; a bar keeps room for its name."""
        return max(3.6, 1 + 0.2 * len(self.series))

    def draw(self, axes: Any) -> None:
        axes.barh(list(self.series), list(self.series.values()))
        axes.invert_yaxis()
        axes.set(xlabel=self.label)


@dataclass(frozen=True)
class Outcome:
    case: str
    title: str
    tables: Sequence[Table]
    targets: Sequence[Target]
    plot: Lines | Bars
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Machine:
    """Read before the first measurement, so that the load is what others brought."""

    processor: str
    cores: int
    memory_gib: float
    load: tuple[float, float, float]

    @classmethod
    def read(cls) -> Machine:
        import psutil

        cores = len(os.sched_getaffinity(0))
        memory = psutil.virtual_memory().total / 2**30
        return cls(_processor() + _gpu(), cores, memory, os.getloadavg())

    @property
    def text(self) -> str:
        load = ", ".join(f"{value:.2f}" for value in self.load)
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB; {platform.system()}; "
            f"load average at the start: {load}"
        )


def write(outcome: Outcome, machine: Machine, folder: Path, command: Sequence[str], small: bool) -> Path:
    """The record's path; its plot lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _fresh(folder, f"{datetime.now():%Y-%m-%d}-{outcome.case}")
    _plot(outcome, path.with_suffix(".png"))
    path.write_text(_text(outcome, machine, path.with_suffix(".png").name, command, small))
    return path


def _text(outcome: Outcome, machine: Machine, picture: str, command: Sequence[str], small: bool) -> str:
    missed = [target.what for target in outcome.targets if not target.met]
    verdict = f"Missed: {'; '.join(missed)}." if missed else "Every target is met."
    lines = [target.line for target in outcome.targets]
    if not lines:
        verdict = "No figure is required here."
    if small:
        verdict = "A trial at a small shape: its figures say nothing of the targets, nor does what is met."
    parts = [
        f"# {outcome.title}",
        verdict,
        f"- {machine.text}\n- {versions()}\n- command: `{' '.join(command)}`",
        *(["\n".join(["| target | required | found | met |", "|---|---|---|---|", *lines])] if lines else []),
        *(table.text for table in outcome.tables),
        *outcome.notes,
        f"![{outcome.case}]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def _plot(outcome: Outcome, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, outcome.plot.height), dpi=100, layout="constrained")
    outcome.plot.draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(outcome.title, fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _fresh(folder: Path, name: str) -> Path:
    path, number = folder / f"{name}.md", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.md"
    return path


def _gpu() -> str:
    import torch

    return f" and {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def versions() -> str:
    found = [f"{name} {_version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, " + ", ".join(found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The kernel's name for the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
