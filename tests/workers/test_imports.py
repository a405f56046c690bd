"""What computes runs where torch, transformers and PEFT's files are: no Ray, MLflow, pydantic or S3."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import sys
for name in ("ray", "mlflow", "pydantic", "sqlalchemy", "deepspeed"):
    sys.modules[name] = None
import workers.host, workers.serve
assert not {"workers.object_store", "s3fs"} & sys.modules.keys(), "only a named store needs them"
"""


def test_imports_of_a_host_need_no_ray_mlflow_or_pydantic():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
