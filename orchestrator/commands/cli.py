"""The commands of `chorus`: their names, options and help. What they do is in `*_command(s)`, imported late.

Imports nothing but typer and the standard library at the top: `chorus --help` takes as long as this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from orchestrator.commands.adapters_cli import adapters_app
from orchestrator.commands.home import Home
from orchestrator.commands.options import (
    DEFAULT_HOME,
    SETTINGS,
    HomeFolder,
    Output,
    Reference,
    RegisteredName,
    StoreUrl,
)
from orchestrator.commands.output import Format, console, emit
from orchestrator.commands.parts import ClusterChoice


class Commands(TyperGroup):
    """All commands, and the one place where an exception becomes a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            if type(error).__module__.startswith("typer"):
                raise
            from orchestrator.commands.errors import explain

            found = explain(error)
            if found is None:
                raise
            code, sentence = found
            print(f"chorus: {sentence}", file=sys.stderr)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="chorus",
    cls=Commands,
    help="Train many LoRA jobs at once on one frozen base; register, fuse, gate and release their adapters.",
    epilog="Exit codes: 0 ok, 1 internal, 2 usage or bad recipe, 3 refused, 4 server unreachable, "
    "100 failed, 101 not finished, 102 not found, 103 cancelled, 130 Ctrl-C.",
    **SETTINGS,
)
recipe_app = typer.Typer(help="Recipe files.", **SETTINGS)
app.add_typer(adapters_app, name="adapters")
app.add_typer(recipe_app, name="recipe")

RecipeFile = Annotated[Path, typer.Argument(metavar="FILE", help="A recipe or a pipeline.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id or name.")]
JobOrRun = Annotated[str, typer.Argument(metavar="JOB|RUN", help="Id or name of a job or of a run.")]
NewFolder = Annotated[Path, typer.Option(help="A folder that does not exist yet.")]


def _home(folder: Path, store: str | None = None) -> Home:
    return Home(folder.absolute(), store)


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


# ---- running --------------------------------------------------------------------------------------------


@app.command()
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
    _exit(body(ctx.obj, RunOptions(file, _home(home, store), choice, follow)))


@app.command()
def plan(
    ctx: typer.Context,
    file: RecipeFile,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Show what FILE would do: steps, sizes, tokens, and what is done already."""
    from orchestrator.commands.recipes import plan as body

    body(ctx.obj, _home(home, store), file, output)


@app.command()
def ps(
    ctx: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Finished jobs of earlier runs too.")
    ] = False,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """List jobs."""
    from orchestrator.commands.jobs import ps as body

    body(ctx.obj, _home(home, store), everything, output)


@app.command()
def status(
    ctx: typer.Context,
    reference: JobOrRun,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Show one job or run; exits with 0, 100 (failed), 101 (not finished) or 103 (cancelled)."""
    from orchestrator.commands.jobs import status as body

    _exit(body(ctx.obj, _home(home, store), reference, output))


@app.command()
def logs(
    ctx: typer.Context,
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has finished.")] = False,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Show what happened to a job, and its steps; exits as `status` does."""
    from orchestrator.commands.jobs import logs as body

    _exit(body(ctx.obj, _home(home, store), job, follow, output))


@app.command()
def submit(
    ctx: typer.Context,
    file: RecipeFile,
    key: Annotated[
        str | None, typer.Option(help="Of your own: a second submission under it is the first one.")
    ] = None,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Put FILE's jobs into the queue and return; `serve` or any `run` does them."""
    from orchestrator.commands.submit import submit as body

    body(ctx.obj, _home(home, store), file, key, output)


@app.command()
def serve(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray gives out.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster that exists.")] = None,
) -> None:
    """Work on all that is submitted, until Ctrl-C."""
    from orchestrator.commands.serve import serve as body

    _exit(body(ctx.obj, _home(home, store), ClusterChoice(False, cpus, ray_address), console()))


@app.command()
def explain(
    ctx: typer.Context,
    job: JobName,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Say why a job waits, who goes first, and what would have to be freed."""
    from orchestrator.commands.explaining import explain as body

    body(ctx.obj, _home(home, store), job, output)


@app.command()
def events(
    ctx: typer.Context,
    job: JobName,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """Show every change of a job's status: who, when, from, to, why."""
    from orchestrator.commands.looking import events as body

    body(ctx.obj, _home(home, store), job, output)


@app.command()
def hosts(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """List the hosts at work, and who sits there."""
    from orchestrator.commands.looking import hosts as body

    body(ctx.obj, _home(home, store), output)


@app.command()
def teams(
    ctx: typer.Context,
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
    output: Output = Format.table,
) -> None:
    """List teams with unfinished jobs, and their shares."""
    from orchestrator.commands.looking import team_table as body

    body(ctx.obj, _home(home, store), output)


@app.command()
def cancel(
    ctx: typer.Context, reference: JobOrRun, home: HomeFolder = DEFAULT_HOME, store: StoreUrl = None
) -> None:
    """Cancel a job, or all jobs of a run."""
    from orchestrator.commands.asking import ask

    ask(ctx.obj, _home(home, store), "cancel", reference, console())


@app.command()
def pause(
    ctx: typer.Context, reference: JobOrRun, home: HomeFolder = DEFAULT_HOME, store: StoreUrl = None
) -> None:
    """Take a job, or all jobs of a run, off their hosts after saving them."""
    from orchestrator.commands.asking import ask

    ask(ctx.obj, _home(home, store), "pause", reference, console())


@app.command()
def resume(
    ctx: typer.Context, reference: JobOrRun, home: HomeFolder = DEFAULT_HOME, store: StoreUrl = None
) -> None:
    """Let what was paused go on."""
    from orchestrator.commands.asking import ask

    ask(ctx.obj, _home(home, store), "resume", reference, console())


@app.command()
def priority(
    ctx: typer.Context,
    reference: JobOrRun,
    value: Annotated[str, typer.Argument(help="low, normal, high, or 0 to 100.")],
    home: HomeFolder = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Give a job, or all jobs of a run, another priority."""
    from orchestrator.commands.asking import ask, priority_of

    ask(ctx.obj, _home(home, store), "priority", reference, console(), priority_of(value))


# ---- adapters -------------------------------------------------------------------------------------------


@app.command()
def promote(
    ctx: typer.Context,
    name: RegisteredName,
    version: Annotated[str, typer.Argument(help="Its number, or an alias like candidate.")],
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Make a version champion if it meets its gates."""
    from orchestrator.commands.adapters import promote as body

    body(ctx.obj, _home(home), name, version, console())


@app.command()
def rollback(
    ctx: typer.Context,
    name: RegisteredName,
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Make the previous champion champion again."""
    from orchestrator.commands.adapters import rollback as body

    body(ctx.obj, _home(home), name, console())


@app.command()
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
    body(ctx.obj, _home(home), options, console())


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of figures like 1,0.5", param_hint="--weights"
        ) from None


@app.command()
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

    body(ctx.obj, _home(home, store), ReleaseOptions(reference, out, merged, base, repair, key), console())


# ---- the rest -------------------------------------------------------------------------------------------


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Left out: any free one.")] = None,
    home: HomeFolder = DEFAULT_HOME,
) -> None:
    """Serve the MLflow page until Ctrl-C."""
    from orchestrator.commands.ui import ui as body

    body(_home(home), port, console())


@app.command()
def doctor(home: HomeFolder = DEFAULT_HOME, output: Output = Format.table) -> None:
    """Say what is missing on this machine; exits with 1 if something needed is."""
    from orchestrator.commands import doctor as body

    found = body.checks(home.absolute())
    emit(body.to_json(found), output, lambda out: body.print_checks(out, found))
    _exit(0 if all(check.ok for check in found) else 1)


@app.command()
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
    body.run(ctx.obj, _home(home), options, output)


@recipe_app.command()
def validate(file: RecipeFile, output: Output = Format.table) -> None:
    """Check a file: its keys, base, data and gates."""
    from orchestrator.commands.recipes import validate as body

    body(file, output)


@recipe_app.command()
def schema() -> None:
    """Print the JSON schema of recipes and pipelines."""
    from orchestrator.commands.recipes import schema as body

    body()
