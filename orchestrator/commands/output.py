"""How a command shows what it found: a table for people, JSON or YAML for programs. No content of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class Format(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


def emit(value: Any, format: Format, table: Callable[[Console], None]) -> None:
    """Print `value`, JSON values only, as asked; `table` prints the same for people."""
    if format is Format.json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
    elif format is Format.yaml:
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")
    else:
        table(console())


def console(stderr: bool = False) -> Console:
    """Where people read. Without a terminal nothing is cut or coloured."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 1000, highlight=False, markup=False)


def grid(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `right` hold figures."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return table


# ---- words for figures ----------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`4:05` or `1:02:03`; empty for None."""
    if seconds is None:
        return ""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def moment(seconds: float | None) -> str:
    """Local date and time of seconds since the epoch; empty for None."""
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
