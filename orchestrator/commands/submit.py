"""`chorus submit`: a recipe file becomes a run in the queue, or is refused."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from orchestrator.api import errors
from orchestrator.api.fitting import FitView
from orchestrator.api.service import Service, Value
from orchestrator.commands.output import Format, duration, emit, megabytes
from orchestrator.disk import is_full, room
from orchestrator.home import Home


def submit(service: Service, file: Path, key: str | None, format: Format) -> None:
    """Put the file's jobs into the queue, on disk at the return. Raises BadInput before anything is made."""
    value = service.submit(file, key)
    emit(value, format, lambda out: _print(out, value, service.flag))


def _print(out: Console, value: Value, flag: str) -> None:
    for notice in value["notices"]:
        out.print(f"note: {notice}", soft_wrap=True)
    if value["nothing_to_do"]:
        out.print(f"nothing to do: every step of {value['name']} is done, by {value['id']}", soft_wrap=True)
        return
    out.print(f"{value['id']}: {', '.join(job['name'] for job in value['jobs'])}", soft_wrap=True)
    for job in value["jobs"]:
        if job["fit"] is not None:
            out.print(f"{job['name']}: {fit_words(job['fit'])}", soft_wrap=True)
    if value["at_work"]:
        out.print(f"to watch: chorus status {value['id']}{flag}", soft_wrap=True)
    else:
        out.print(f"nobody works here yet; `chorus serve{flag}` does", soft_wrap=True)


def fit_words(view: FitView) -> str:
    """One line for a person."""
    words = f"adapter of {view['adapter_parameters']:,} parameters, {megabytes(view['adapter_bytes'])}"
    words += f", {megabytes(view['memory_bytes'])} on each rank while it trains"
    if view["tokens"] is not None:
        words += f"; about {view['tokens']:,} tokens"
    if view["seconds"] is not None:
        words += (
            f", {duration(view['seconds'])} of training, {view['rank_seconds']:,.0f} rank-seconds of its own"
        )
    if view["never"] is not None:
        return f"{words}. It cannot run as the cluster is: {view['never']}"
    if view["host"] is not None:
        return f"{words}. It would join {view['host']}, where {view['beside']} train"
    return words


@contextmanager
def told_of_a_full_disk(home: Home, again: str) -> Generator[None]:
    """Raises DiskFull for what says so less well: SQLite names no folder, and nobody what is free."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        where = Path(getattr(error, "filename", None) or home.folder)
        raise errors.DiskFull(
            f"the disk takes no more: {room(where)}; what is done is kept: free some space and go on with "
            f"`{again}`"
        ) from error
