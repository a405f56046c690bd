"""The host without Ray and without the orchestrator: `workers.serve` as a program."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict

from workers.serve import main

SECONDS = 120.0


def written(folder, base, specs):
    """`base.json` and a file a job, as a user would write them; their paths."""
    values = {"base": asdict(base), **{spec.job: asdict(spec) for spec in specs}}
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return [str(folder / f"{name}.json") for name in values]


def lines_of(command):
    """Standard output of a program that must end by itself with 0; torchrun ends its ranks on SIGTERM."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            output, errors = program.communicate(timeout=SECONDS)
        finally:
            program.send_signal(signal.SIGTERM)
    assert program.returncode == 0, errors
    return output.splitlines()


def test_serve_under_torchrun_trains_jobs_together_and_prints_their_steps(base, jobs, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    lines = lines_of([*torchrun, "-m", "workers.serve", *written(tmp_path, base, jobs[:2])])
    assert [line.split(" slots")[0] for line in lines[:1]] == ["HostReady world_size=2 zero=3"]
    steps = {line.split(" loss")[0] for line in lines}
    assert {f"{spec.job} step {step}" for spec in jobs[:2] for step in (1, 2, 3, 4)} <= steps
    assert sum(line.startswith("TrainingFinished") for line in lines) == 2


def test_serve_alone_job_that_is_stopped_gives_exit_code_1(base, jobs, tmp_path, capsys):
    (tmp_path / "wide.jsonl").write_text('{"label": "negative"}\n')
    assert main(written(tmp_path, base, jobs[:1])) == 1
    assert "JobStopped job=wide" in capsys.readouterr().out


def test_serve_alone_base_that_is_no_model_gives_exit_code_2(jobs, base, tmp_path, capsys):
    files = written(tmp_path, base, jobs[:1])
    (tmp_path / "base.json").write_text('{"path": "nowhere"}')
    assert main(files) == 2
    assert capsys.readouterr().err.startswith("base_model: nowhere has no config.json")
