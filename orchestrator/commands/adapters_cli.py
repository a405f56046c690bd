"""The commands under `chorus adapters`: names, options, help. What they do is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import (
    DEFAULT_HOME,
    SETTINGS,
    HomeFolder,
    Output,
    Reference,
    RegisteredName,
    home_of,
)
from orchestrator.commands.output import Format

adapters_app = typer.Typer(help="Adapter versions in the registry.", **SETTINGS)


@adapters_app.command("list")
def list_adapters(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Only versions of this name.")] = None,
    task: Annotated[str | None, typer.Option(help="Only versions scored on this task.")] = None,
    base: Annotated[str | None, typer.Option(help="Only of this base: its name, or its digest.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Like 'macro_f1 >= 0.8'; may be repeated.")] = None,
    alias: Annotated[str | None, typer.Option(help="Only versions with this alias, like champion.")] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="NAME[/N]", help="Only what was fused from it.")
    ] = None,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """List registered versions."""
    from orchestrator.commands.adapters import list_adapters as body
    from orchestrator.commands.filters import Filters

    body(ctx.obj, home_of(home), Filters(name, task, base, alias, parent, tuple(metric or ())), output)


@adapters_app.command()
def show(
    ctx: typer.Context,
    reference: Reference,
    card: Annotated[
        bool, typer.Option("--card", help="Its README.md: all scores, examples, limits.")
    ] = False,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Show one version: its scores beside the base's, its gates, and what it is bound to."""
    from orchestrator.commands.adapters import show as body

    body(ctx.obj, home_of(home), reference, card, output)


@adapters_app.command()
def compare(
    ctx: typer.Context,
    references: Annotated[list[str], typer.Argument(metavar="NAME@REF...", help="Two versions or more.")],
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Show the scores of several versions side by side."""
    from orchestrator.commands.adapters import compare as body

    body(ctx.obj, home_of(home), references, output)


@adapters_app.command()
def diff(
    ctx: typer.Context,
    one: Reference,
    other: Reference,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Show what two versions differ in: scores with the interval of the difference, tags, recipe."""
    from orchestrator.commands.inspection import diff as body

    body(ctx.obj, home_of(home), (one, other), output)


@adapters_app.command()
def lineage(
    ctx: typer.Context, reference: Reference, home: HomeFolder = DEFAULT_HOME, output: Output = Format.table
) -> None:
    """Show what a version was made from, and what was made from it."""
    from orchestrator.commands.inspection import lineage as body

    body(ctx.obj, home_of(home), reference, output)


@adapters_app.command()
def history(
    ctx: typer.Context, name: RegisteredName, home: HomeFolder = DEFAULT_HOME, output: Output = Format.table
) -> None:
    """Show every move of a champion: who, when, from, to, why."""
    from orchestrator.commands.inspection import history as body

    body(ctx.obj, home_of(home), name, output)


@adapters_app.command()
def gates(
    ctx: typer.Context,
    name: RegisteredName,
    file: Annotated[
        Path | None, typer.Option("--file", help="YAML with the new gates; an empty file takes them away.")
    ] = None,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Show, or set, what every version of a name must meet beside the gates of its own recipe."""
    from orchestrator.commands.inspection import gates as body

    body(ctx.obj, home_of(home), name, file, output)


@adapters_app.command()
def verify(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Only versions of this name.")] = None,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Check every byte, tag and alias in the registry; exits with 3 and names what was altered."""
    from orchestrator.commands.inspection import verify as body

    if body(ctx.obj, home_of(home), name, output):
        raise typer.Exit(3)
