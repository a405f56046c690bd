"""The commands of `chorus`: which there are, in the order of the help, and how an error ends one.

What they take is in `*_cli`, what they do in the modules that those import late: `chorus --help` takes as
long as these files, which import nothing but typer and the standard library at the top.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from orchestrator.commands import queue_cli, release_cli, run_cli, site_cli
from orchestrator.commands.adapters_cli import adapters_app
from orchestrator.commands.options import SETTINGS


class Commands(TyperGroup):
    """All commands, and the one place where an exception becomes a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            if type(error).__module__.startswith("typer"):
                raise
            from orchestrator.api.errors import explain

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
for command in (
    *(run_cli.run, run_cli.plan, queue_cli.ps, queue_cli.status, queue_cli.logs),
    *(run_cli.submit, run_cli.serve),
    *(queue_cli.explain, queue_cli.events, queue_cli.hosts, queue_cli.teams),
    *(queue_cli.cancel, queue_cli.pause, queue_cli.resume, queue_cli.priority),
    *(release_cli.promote, release_cli.rollback, release_cli.fuse, release_cli.release, release_cli.verify),
    *(site_cli.ui, site_cli.api, site_cli.token, site_cli.doctor, site_cli.simulate),
):
    app.command()(command)
for command in (run_cli.validate, run_cli.schema):
    recipe_app.command()(command)
