"""`chorus run` told to stop: one line says how to go on, and Ray adds none of its own."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.integration.test_run_killed import World, make_world

SECONDS = 60.0
STARTING, TRAINING = "starting the MLflow server and the cluster", "RUNNING: trains"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("stopped"), 2, "--cpus", "2")


@pytest.mark.parametrize(("moment", "number"), [(STARTING, signal.SIGINT), (TRAINING, signal.SIGTERM)])
def test_run_on_ray_told_to_stop_says_in_one_line_how_to_go_on(world, moment, number):
    code, said = stopped_at(world, moment, number)
    assert code == 130, said
    assert "***" not in said, said
    assert "Traceback" not in said, said
    assert said.splitlines()[-1] == "stopped; what is done is kept. To go on: chorus run demo.yaml --cpus 2"


def stopped_at(world: World, words: str, number: int) -> tuple[int, str]:
    """Start, stop as soon as the command has printed `words`; exit code, and all that it printed."""
    process = subprocess.Popen(
        world.command(),
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A suite started in the background of a shell has SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    said = ""
    try:
        while words not in said:
            said += (line := process.stdout.readline())
            assert line, said
        process.send_signal(number)
        rest, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, said + rest
