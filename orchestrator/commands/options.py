"""Arguments and options that several commands share. Imports nothing but typer: help must be quick."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orchestrator.commands.output import Format
from orchestrator.home import Home

if TYPE_CHECKING:
    from orchestrator.api.service import Service

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    # rich takes 0.1 s to import, and its tracebacks would hide the line that matters.
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
HomeFolder = Annotated[
    Path, typer.Option("--home", envvar="CHORUS_HOME", help="Folder of jobs, checkpoints and MLflow.")
]
DEFAULT_HOME = Path(".chorus")
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="CHORUS_STORE",
        help="sqlite:///FILE or postgresql://USER@HOST/DATABASE. Left out: chorus.db of the home.",
    ),
]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="CHORUS_SERVER",
        help="http://HOST:PORT of a `chorus api`, in place of a home; its token in CHORUS_TOKEN.",
    ),
]
Output = Annotated[Format, typer.Option("--output", "-o", help="For people or for programs.")]
Reference = Annotated[str, typer.Argument(metavar="NAME@REF", help="NAME@champion, NAME@3 or NAME/3.")]
RegisteredName = Annotated[str, typer.Argument(help="Registered name.")]


def home_of(folder: Path, store: str | None = None) -> Home:
    return Home(folder.absolute(), store)


def reached(
    ctx: typer.Context, folder: Path, store: str | None, server: str | None
) -> AbstractContextManager[Service]:
    """Where a command on jobs asks."""
    from orchestrator.commands.reaching import reach

    return reach(ctx.obj, home_of(folder, store), server)


def leave(code: int) -> NoReturn:
    raise typer.Exit(code)
