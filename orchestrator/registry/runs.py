"""Runs in MLflow: one per job, found again by its key; curves, inputs, evaluations.

Owns what a run holds. Everything here may be done twice with the same arguments and changes nothing the
second time.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS

from orchestrator.contracts import MetricPoint, Scores
from orchestrator.registry import plots
from orchestrator.registry.client import (
    MAX_METRICS,
    MAX_PARAMS,
    MAX_TAGS,
    added_by_another,
    experiment_id,
    metric_key,
    post,
    quoted,
)
from orchestrator.registry.evaluations import as_json, json_value

KEY_TAG = "chorus.key"
DIGEST_LENGTH = 36
"""Of a data set's digest in MLflow; the whole SHA-256 is in a tag."""


def start_run(
    client: MlflowClient,
    key: str,
    experiment: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """The run of `key` in `experiment`, created if absent; a run that failed or was killed goes on."""
    experiment = experiment_id(client, experiment)
    run = _find(client, experiment, key) or client.create_run(experiment, run_name=name, tags={KEY_TAG: key})
    run_id = str(run.info.run_id)
    if run.info.status in ("FAILED", "KILLED"):
        client.update_run(run_id, status="RUNNING")
    # A parameter may never change its value in MLflow, so only the absent ones are written.
    absent = [Param(k, str(v)) for k, v in params.items() if k not in run.data.params]
    for batch in _batches(absent, MAX_PARAMS):
        client.log_batch(run_id, params=batch)
    for batch in _batches([RunTag(k, str(v)) for k, v in tags.items()], MAX_TAGS):
        client.log_batch(run_id, tags=batch)
    return run_id


def _find(client: MlflowClient, experiment: str, key: str) -> Run | None:
    """The oldest run of that key: a repeated request may have made a second."""
    found = client.search_runs(
        [experiment],
        f"tags.`{KEY_TAG}` = {quoted(key)}",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0] if found else None


def log_points(client: MlflowClient, run_id: str, points: Sequence[MetricPoint]) -> None:
    """Append to the run's curves. A point logged before (same key, step, time and value) is not repeated."""
    # The request that `client.log_batch` makes. It takes 110 us a step to write it down, as a message of
    # protobuf and as JSON twice over: with a hundred jobs at work, most of what the controller does.
    keys = {key: metric_key(key) for key in {point.key for point in points}}
    for batch in _batches(points, MAX_METRICS):
        metrics = [
            {"key": keys[p.key], "value": _number(p.value), "timestamp": p.timestamp_ms, "step": p.step}
            for p in batch
        ]
        post(client, "runs/log-batch", {"run_id": run_id, "metrics": metrics})


def _number(value: float) -> float | str:
    """As protobuf's JSON has it, which knows what JSON does not: `NaN`, `Infinity`, `-Infinity`."""
    return value if math.isfinite(value) else str(value).replace("nan", "NaN").replace("inf", "Infinity")


def log_inputs(client: MlflowClient, run_id: str, datasets: Mapping[str, tuple[str, str]]) -> None:
    """Data sets by context; the whole digest goes into the tag `data.<context>.sha256`."""
    inputs = [_dataset_input(context, path, digest) for context, (path, digest) in datasets.items()]
    for turn in count():
        try:
            client.log_inputs(run_id, datasets=inputs)
            break
        except MlflowException as error:
            # Another run of the experiment added a data set after MLflow had looked for it: now it is found.
            if not added_by_another(error) or turn == len(inputs):
                raise
    tags = [RunTag(f"data.{context}.sha256", digest) for context, (_, digest) in datasets.items()]
    client.log_batch(run_id, tags=tags)


def dataset(path: str, digest: str) -> Dataset:
    """MLflow's record of a data set: the last two parts of its path as name, its digest shortened."""
    name = "/".join(Path(path).parts[-2:])
    return Dataset(name, digest[:DIGEST_LENGTH], "local", json.dumps({"uri": path, "sha256": digest}))


def _dataset_input(context: str, path: str, digest: str) -> DatasetInput:
    return DatasetInput(dataset(path, digest), [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def log_evaluation(client: MlflowClient, run_id: str, scores: Sequence[Scores], prefix: str = "") -> None:
    """Per task: metrics `<prefix>/<task>/<metric>`; in `<prefix>/evaluation/<task>` report, plots, table."""
    run = client.get_run(run_id)
    # The time of the run's start, so that logging again adds no second point.
    when = int(run.info.start_time or 0)
    for score in scores:
        points = [
            MetricPoint(metric_key(prefix, score.task, key), value, 0, when)
            for key, value in score.report.metrics.items()
        ]
        log_points(client, run_id, points)
        _log_evaluation_files(
            client, run_id, score, "/".join(filter(None, (prefix.strip("/"), "evaluation")))
        )


def _log_evaluation_files(client: MlflowClient, run_id: str, score: Scores, folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        (here / "report.json").write_text(json.dumps(as_json(score), indent=2) + "\n")
        plots.evaluation_plots(score, None, here)
        if score.report.predictions:
            (here / "predictions.json").write_text(json.dumps(table(score.report.predictions)))
        client.log_artifacts(run_id, scratch, f"{folder}/{score.task}")
    if score.report.predictions:
        _mark_table(client, run_id, f"{folder}/{score.task}/predictions.json")


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows in the layout of MLflow's tables (pandas `orient="split"`); a field a row lacks is null."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[json_value(row.get(c)) for c in columns] for row in rows]}


def _mark_table(client: MlflowClient, run_id: str, path: str) -> None:
    """Tell MLflow's page that a file is a table. Its own `log_table` would append the rows a second time."""
    tags = client.get_run(run_id).data.tags
    listed = json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    entry = {"path": path, "type": "table"}
    if entry not in listed:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    left = iter(items)
    return list(iter(lambda: list(islice(left, size)), []))
