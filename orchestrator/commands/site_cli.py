"""Commands about the place of work: `ui`, `api`, `token`, `doctor`, `simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_HOME, HomeFolder, Output, StoreUrl, home_of, leave
from orchestrator.commands.output import Format, console, emit


def ui(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Left out: any free one.")] = None,
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Serve the MLflow page until Ctrl-C."""
    from orchestrator.commands.ui import ui as body

    body(home_of(home), port, console())


def api(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8430,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Let others submit, look and change over HTTP, until Ctrl-C; `serve` or `run` does the work."""
    from orchestrator.commands.api import api as body

    leave(body(ctx.obj, home_of(home, store), host, port, console()))


def token(
    name: Annotated[str, typer.Argument(help="Whose; it stands in the events of what they change.")],
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Make NAME's token for `chorus api`, and print it this once; an older one of NAME holds no more."""
    from orchestrator.api.tokens import grant

    print(grant(home.absolute(), name))


def doctor(home: HomeFolder = DEFAULT_HOME, output: Output = Format.table) -> None:
    """Say what is missing on this machine; exits with 1 if something needed is."""
    from orchestrator.commands import doctor as body

    found = body.checks(home.absolute())
    emit(body.to_json(found), output, lambda out: body.print_checks(out, found))
    leave(0 if all(check.ok for check in found) else 1)


def simulate(
    ctx: typer.Context,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A Philly, Gavel or Tiresias trace, or a home folder.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the cluster.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(help="chorus (unless given), las, fifo-skip, fifo; several times to compare."),
    ] = None,
    teams: Annotated[Path | None, typer.Option(help="A teams.yaml. Left out: that of the home.")] = None,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two decisions.")] = 300.0,
    load: Annotated[float, typer.Option(min=0, help="Seconds that opening a host takes.")] = 60.0,
    shared: Annotated[
        float, typer.Option(min=0, max=1, help="Part of a tick that the residents of a host share.")
    ] = 0.0,
    steps_known: Annotated[
        bool, typer.Option("--steps-known", help="Steps to come are known once a job has run.")
    ] = False,
    steps_per_second: Annotated[float | None, typer.Option(min=1e-9, help="For a Gavel trace.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A PNG: queue and shares over time.")] = None,
    home: HomeFolder = DEFAULT_HOME,
    output: Output = Format.table,
) -> None:
    """Run the scheduler over a trace of jobs in simulated time."""
    from orchestrator.commands import simulation as body

    setting = body.Setting(gpus, every, load, shared, steps_known)
    names = body.policy_names(policy or ["chorus"])
    options = body.SimulateOptions(trace, setting, names, teams, steps_per_second, picture)
    body.run(ctx.obj, home_of(home), options, output)
