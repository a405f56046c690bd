"""Commands on versions of adapters and on releases: `promote`, `rollback`, `fuse`, `release`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import (
    DEFAULT_HOME,
    HomeFolder,
    Reference,
    RegisteredName,
    StoreUrl,
    home_of,
)
from orchestrator.commands.output import console

NewFolder = Annotated[Path, typer.Option(help="A folder that does not exist yet.")]


def promote(
    ctx: typer.Context,
    name: RegisteredName,
    version: Annotated[str, typer.Argument(help="Its number, or an alias like candidate.")],
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Make a version champion if it meets its gates."""
    from orchestrator.commands.adapters import promote as body

    body(ctx.obj, home_of(home, store), name, version, console())


def rollback(
    ctx: typer.Context,
    name: RegisteredName,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Make the previous champion champion again."""
    from orchestrator.commands.adapters import rollback as body

    body(ctx.obj, home_of(home, store), name, console())


def fuse(
    ctx: typer.Context,
    adapters: Annotated[list[str], typer.Argument(help="Versions (NAME@champion, NAME/3) or PEFT folders.")],
    out: NewFolder,
    weights: Annotated[str, typer.Option(help="One figure an adapter, like 1,0.5; left out, 1 each.")] = "",
    rule: Annotated[
        str, typer.Option(help="cat: the exact sum; svd: the nearest of a given rank; ties, ...")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result; rule cat takes none.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the rule, like density=0.2.")
    ] = None,
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Fuse adapters of one base into one, in a folder."""
    from orchestrator.commands.export import FuseOptions
    from orchestrator.commands.export import fuse as body

    options = FuseOptions(tuple(adapters), _weights(weights), rule, rank, out, tuple(settings or ()))
    body(ctx.obj, home_of(home), options, console())


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of figures like 1,0.5", param_hint="--weights"
        ) from None


def release(
    ctx: typer.Context,
    reference: Reference,
    out: NewFolder,
    merged: Annotated[bool, typer.Option("--merged", help="A full model instead of the adapter.")] = False,
    base: Annotated[str | None, typer.Option(help="Base file or model folder, if it was moved.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="One rank and scale 1, as vLLM, SGLang and llama.cpp read it.")
    ] = False,
    key: Annotated[Path | None, typer.Option(help="EC private key in PEM: sign the folder.")] = None,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Write a version that passed its gates to a folder, with card, manifest and bill of materials."""
    from orchestrator.commands.export import ReleaseOptions
    from orchestrator.commands.export import release as body

    body(ctx.obj, home_of(home, store), ReleaseOptions(reference, out, merged, base, repair, key), console())


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `release` wrote.")],
    key: Annotated[Path | None, typer.Option(help="Public key in PEM: check the signature too.")] = None,
) -> None:
    """Check a release against its manifest, and its signature; exits with 3 and names what was altered."""
    from orchestrator.commands.export import verify as body

    body(folder, key, console())
