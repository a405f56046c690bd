"""The command line before any command does something: what it imports, what it offers."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.commands.cli import app
from orchestrator.commands.parts import ClusterChoice
from orchestrator.home import Home
from orchestrator.main import real_parts

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "pydantic", "sqlalchemy", "rich", "yaml")
IMPORTED_BY_HELP = """
import json, sys
from orchestrator.main import main
sys.argv = ["chorus", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
COMMANDS = {
    *(
        "run",
        "submit",
        "serve",
        "explain",
        "events",
        "hosts",
        "teams",
        "pause",
        "resume",
        "priority",
        "plan",
        "ps",
        "status",
        "logs",
        "cancel",
        "promote",
        "rollback",
        "fuse",
        "release",
        "verify",
        "ui",
        "api",
        "token",
        "doctor",
    ),
    *(
        "adapters list",
        "adapters show",
        "adapters compare",
        "adapters diff",
        "adapters gates",
        "adapters history",
        "adapters lineage",
        "adapters verify",
        "simulate",
        "recipe validate",
        "recipe schema",
    ),
}


def test_help_of_chorus_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_BY_HELP], capture_output=True, text=True, check=True, timeout=60
    )
    imported = json.loads(done.stdout.splitlines()[-1])
    assert "typer" in imported
    assert set(HEAVY) & set(imported) == set()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_a_command_says_how_to_use_it(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Usage: chorus {command}" in result.stdout


def test_commands_are_those_documented():
    groups = {"adapters", "recipe"}
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    nested = {
        f"{group.name} {command.name or command.callback.__name__}"
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }
    assert {group.name for group in app.registered_groups} == groups
    assert named | nested == COMMANDS


@pytest.mark.parametrize(
    "arguments", [["rum"], ["run"], ["ps", "-o", "xml"], ["run", "a.yaml", "--cpus", "0"]]
)
def test_usage_errors_exit_with_two(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage: chorus" in result.stderr


def test_real_parts_do_nothing_before_they_are_entered(tmp_path):
    """So that a command can have one start in a thread, beside another."""
    home = Home(tmp_path)
    parts = real_parts()
    for part in (parts.store, parts.server, parts.registry):
        part(home)
    parts.cluster(home, ClusterChoice())
    assert list(tmp_path.iterdir()) == []
