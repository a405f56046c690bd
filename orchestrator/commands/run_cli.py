"""Commands that put recipes to work: `run`, `plan`, `submit`, `serve`, and the checks of `recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import (
    DEFAULT_HOME,
    HomeFolder,
    Output,
    ServerUrl,
    StoreUrl,
    home_of,
    leave,
    reached,
)
from orchestrator.commands.output import Format, console
from orchestrator.commands.parts import ClusterChoice

RecipeFile = Annotated[Path, typer.Argument(metavar="FILE", help="A recipe or a pipeline.")]


def run(
    ctx: typer.Context,
    file: RecipeFile,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray gives out.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster that exists.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Watch, or go to the background.")
    ] = True,
) -> None:
    """Train, judge, register, fuse and release what FILE says; go on with a run that was interrupted."""
    from orchestrator.commands.run import RunOptions
    from orchestrator.commands.run import run as body

    choice = ClusterChoice(local, cpus, ray_address)
    leave(body(ctx.obj, RunOptions(file, home_of(home, store), choice, follow)))


def plan(
    ctx: typer.Context,
    file: RecipeFile,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Show what FILE would do: steps, sizes, tokens, and what is done already."""
    from orchestrator.commands.recipes import plan as body

    body(ctx.obj, home_of(home, store), file, output)


def submit(
    ctx: typer.Context,
    file: RecipeFile,
    key: Annotated[
        str | None, typer.Option(help="Of your own: a second submission under it is the first one.")
    ] = None,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """Put FILE's jobs into the queue and return; `serve` or any `run` does them."""
    from orchestrator.commands.submit import submit as body
    from orchestrator.commands.submit import told_of_a_full_disk

    place = home_of(home, store)
    again = f"chorus submit {file}{f' --key {key}' if key else ''}{place.flag()}"
    with told_of_a_full_disk(place, again), reached(ctx, home, store, server) as service:
        body(service, file, key, output)


def serve(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray gives out.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster that exists.")] = None,
) -> None:
    """Work on all that is submitted, until Ctrl-C."""
    from orchestrator.commands.serve import serve as body

    leave(body(ctx.obj, home_of(home, store), ClusterChoice(False, cpus, ray_address), console()))


def validate(file: RecipeFile, output: Output = Format.table) -> None:
    """Check a file: its keys, base, data and gates."""
    from orchestrator.commands.recipes import validate as body

    body(file, output)


def schema() -> None:
    """Print the JSON schema of recipes and pipelines."""
    from orchestrator.commands.recipes import schema as body

    body()
