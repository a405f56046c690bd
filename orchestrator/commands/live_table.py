"""What `chorus run` shows while it works: a live table at a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.commands.output import duration, figure, grid
from orchestrator.commands.progress import JobProgress, RunProgress

LOOK_SECONDS = 0.5
LINE_SECONDS = 10.0
COLUMNS = ("job", "task", "state", "step", "loss", "tokens/s", "left", "what")


@contextmanager
def watching(progress: RunProgress, console: Console) -> Generator[Callable[[], None]]:
    """Yield what the controller calls at every tick; the last look is taken on leaving."""
    if console.is_terminal:
        with Live(_table(progress.look()), console=console, refresh_per_second=4) as live:
            show = _no_more_often(lambda: live.update(_table(progress.look())))
            yield show
            live.update(_table(progress.look()))
    else:
        lines = Lines(progress, lambda line: console.print(line, soft_wrap=True))
        yield _no_more_often(lines.look)
        lines.look()


def _no_more_often(look: Callable[[], None]) -> Callable[[], None]:
    """The controller ticks twenty times a second; nobody reads so fast."""
    last = 0.0

    def at_times() -> None:
        nonlocal last
        if time.monotonic() - last >= LOOK_SECONDS:
            look()
            last = time.monotonic()

    return at_times


def _table(jobs: tuple[JobProgress, ...]) -> Table:
    return grid(COLUMNS, [_cells(job) for job in jobs], right=("step", "loss", "tokens/s", "left"))


def _cells(job: JobProgress) -> tuple[str, ...]:
    speed = f"{job.tokens_per_second:,.0f}" if job.tokens_per_second and job.training else ""
    left = duration(job.seconds_left)
    return (job.name, job.task, job.status, job.steps, figure(job.loss), speed, left, job.doing)


class Lines:
    """A line for every change of a job's state, and one every LINE_SECONDS for one that trains or counts."""

    def __init__(
        self,
        progress: RunProgress,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._write = write
        self._clock = clock
        self._began = clock()
        self._said: dict[str, tuple[str, str]] = {}
        self._next: dict[str, float] = {}

    def look(self) -> None:
        now = self._clock()
        for job in self._progress.look():
            state = (job.status.value, job.doing)
            if self._said.get(job.name) != state:
                self._said[job.name] = state
                self._next[job.name] = now + LINE_SECONDS
                self._write(f"[{duration(now - self._began)}] {job.name} {job.status.value}: {job.doing}")
            elif (job.training or job.counted) and now >= self._next[job.name]:
                self._next[job.name] = now + LINE_SECONDS
                self._write(f"[{duration(now - self._began)}] {_sentence(job)}")


def _sentence(job: JobProgress) -> str:
    if job.counted:
        return f"{job.name} {job.counted}"
    parts = [f"{job.name} step {job.steps}", f"loss {figure(job.loss)}"]
    if job.tokens_per_second:
        parts.append(f"{job.tokens_per_second:,.0f} tokens/s")
    if job.seconds_left is not None:
        parts.append(f"{duration(job.seconds_left)} left")
    return ", ".join(parts)
