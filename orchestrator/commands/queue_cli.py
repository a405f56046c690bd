"""Commands on submitted jobs: to look at them, to say why they wait, to change what becomes of them."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.commands.options import (
    DEFAULT_HOME,
    HomeFolder,
    Output,
    ServerUrl,
    StoreUrl,
    leave,
    reached,
)
from orchestrator.commands.output import Format, console

JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id or name.")]
JobOrRun = Annotated[str, typer.Argument(metavar="JOB|RUN", help="Id or name of a job or of a run.")]


def ps(
    ctx: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Finished jobs of earlier runs too.")
    ] = False,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """List jobs."""
    from orchestrator.commands.jobs import ps as body

    with reached(ctx, home, store, server) as service:
        body(service, everything, output)


def status(
    ctx: typer.Context,
    reference: JobOrRun,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """Show one job or run; exits with 0, 100 (failed), 101 (not finished) or 103 (cancelled)."""
    from orchestrator.commands.jobs import status as body

    with reached(ctx, home, store, server) as service:
        code = body(service, reference, output)
    leave(code)


def logs(
    ctx: typer.Context,
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has finished.")] = False,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """Show what happened to a job, and its steps; exits as `status` does."""
    from orchestrator.commands.jobs import logs as body

    with reached(ctx, home, store, server) as service:
        code = body(service, job, follow, output)
    leave(code)


def explain(
    ctx: typer.Context,
    job: JobName,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """Say why a job waits, who goes first, and what would have to be freed."""
    from orchestrator.commands.explaining import explain as body

    with reached(ctx, home, store, server) as service:
        body(service, job, output)


def events(
    ctx: typer.Context,
    job: JobName,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """Show every change of a job's status: who, when, from, to, why."""
    from orchestrator.commands.looking import events as body

    with reached(ctx, home, store, server) as service:
        body(service, job, output)


def hosts(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """List the hosts at work, and who sits there."""
    from orchestrator.commands.looking import hosts as body

    with reached(ctx, home, store, server) as service:
        body(service, output)


def teams(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
    output: Output = Format.table,
) -> None:
    """List teams with unfinished jobs, and their shares."""
    from orchestrator.commands.looking import team_table as body

    with reached(ctx, home, store, server) as service:
        body(service, output)


def cancel(
    ctx: typer.Context,
    reference: JobOrRun,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
) -> None:
    """Cancel a job, or all jobs of a run."""
    from orchestrator.commands.asking import ask

    with reached(ctx, home, store, server) as service:
        ask(service, "cancel", reference, console())


def pause(
    ctx: typer.Context,
    reference: JobOrRun,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
) -> None:
    """Take a job, or all jobs of a run, off their hosts after saving them."""
    from orchestrator.commands.asking import ask

    with reached(ctx, home, store, server) as service:
        ask(service, "pause", reference, console())


def resume(
    ctx: typer.Context,
    reference: JobOrRun,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
) -> None:
    """Let what was paused go on."""
    from orchestrator.commands.asking import ask

    with reached(ctx, home, store, server) as service:
        ask(service, "resume", reference, console())


def priority(
    ctx: typer.Context,
    reference: JobOrRun,
    value: Annotated[str, typer.Argument(help="low, normal, high, or 0 to 100.")],
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    server: ServerUrl = None,
) -> None:
    """Give a job, or all jobs of a run, another priority."""
    from orchestrator.api.changes import priority_of
    from orchestrator.commands.asking import ask

    with reached(ctx, home, store, server) as service:
        ask(service, "priority", reference, console(), priority_of(value))
