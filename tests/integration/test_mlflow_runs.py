"""What a user finds in MLflow: curves, inputs, plots, tables, a version's files, the release records."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.contracts import MetricPoint, RegistryConflict
from orchestrator.registry.client import metric_key
from orchestrator.registry.registry import MlflowRegistry
from tests.contract.samples import classification, fresh_name, new_version, recommendation, shared_server

START = 1_700_000_000_000


@pytest.fixture(scope="module")
def registry():
    return MlflowRegistry(shared_server().url)


@pytest.fixture(scope="module")
def client(registry):
    return MlflowClient(registry.url)


@pytest.fixture
def name():
    return fresh_name()


def text(client, run_id, path, folder):
    from mlflow.artifacts import download_artifacts

    uri = f"{client.get_run(run_id).info.artifact_uri}/{path}"
    found = download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=client.tracking_uri)
    return Path(found).read_text()


def test_curve_longer_than_a_batch_logged_twice_has_each_point_once(registry, client, name):
    run = registry.start_run(name, "jobs", "job", {f"p{i}": str(i) for i in range(150)}, {"task": "chat"})
    points = [MetricPoint("loss", 3 / s, s, START + s) for s in range(1, 1203)]
    registry.log_metrics(run, points)
    registry.log_metrics(run, points[-40:])
    history = client.get_metric_history(run, "loss")
    assert [(m.step, m.value) for m in history] == [(p.step, p.value) for p in points]
    assert len(client.get_run(run).data.params) == 150


@pytest.mark.parametrize("value", [1 / 3, -0.0, 5e-324, 1e300, float("nan"), float("inf"), float("-inf"), 7])
def test_points_are_what_mlflows_own_client_logs(registry, client, name, value):
    run = registry.start_run(name, "jobs", "job", {}, {})
    registry.log_metrics(run, [MetricPoint("ours@1", value, 3, START)])
    client.log_batch(run, [Metric("theirs_at_1", value, START, 3)])
    ours, theirs = (client.get_metric_history(run, key)[0] for key in ("ours_at_1", "theirs_at_1"))
    assert repr((ours.value, ours.step, ours.timestamp)) == repr(
        (theirs.value, theirs.step, theirs.timestamp)
    )


def test_points_for_a_run_that_is_not_there_are_refused_by_name(registry):
    with pytest.raises(MlflowException, match="no-such-run"):
        registry.log_metrics("no-such-run", [MetricPoint("loss", 1.0, 1, START)])


def test_evaluation_logged_twice_has_metrics_plots_and_one_table(
    registry, client, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.url)  # `load_table` knows no other way
    run = registry.start_run(name, "jobs", "job", {}, {})
    for _ in range(2):
        registry.log_evaluation(run, [classification()], "base")
    folder = "base/evaluation/sentiment"
    files = {file.path: file.file_size for file in client.list_artifacts(run, folder)}
    assert set(files) == {
        f"{folder}/{name}" for name in ("confusion.png", "metrics.png", "predictions.json", "report.json")
    }
    assert files[f"{folder}/confusion.png"] > 5_000
    assert client.get_run(run).data.metrics["base/sentiment/macro_f1"] == 0.9
    assert len(client.get_metric_history(run, "base/sentiment/macro_f1")) == 1
    assert json.loads(text(client, run, f"{folder}/report.json", tmp_path))["confusion"][0] == [18, 1, 1]
    table = client.load_table(client.get_run(run).info.experiment_id, f"{folder}/predictions.json", [run])
    assert list(table["predicted"]) == ["negative", "neutral", "positive"] * 2


def test_inputs_keep_context_and_the_whole_digest(registry, client, name):
    run = registry.start_run(name, "jobs", "job", {}, {})
    registry.log_inputs(
        run, {"training": ("data/a/train.jsonl", "a" * 64), "test": ("data/a/test.jsonl", "b" * 64)}
    )
    found = client.get_run(run)
    contexts = {i.tags[0].value: i.dataset.name for i in found.inputs.dataset_inputs}
    assert contexts == {"training": "a/train.jsonl", "test": "a/test.jsonl"}
    assert found.data.tags["data.training.sha256"] == "a" * 64


def test_version_holds_all_its_files_and_links(registry, client, name, tmp_path):
    scores = [classification(), recommendation()]
    changes = {
        "scores": scores,
        "base_scores": [classification(macro_f1=0.2)],
        "fusion_report": {"rule": "svd"},
    }
    version = registry.register(new_version(registry, tmp_path, name, **changes))
    manifest = json.loads(registry.read_text(version, "manifest.json"))
    assert set(manifest["files"]) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "eval/recommendation/metrics.png",
        "eval/report.json",
        "eval/rows.json",
        "eval/sentiment/confusion.png",
        "eval/sentiment/metrics.png",
        "fusion/report.json",
        "recipe.yaml",
    }
    assert yaml.safe_load(registry.read_text(version, "recipe.yaml")) == {"task": "sentiment"}
    report = json.loads(registry.read_text(version, "eval/report.json"))
    assert report["base_scores"][0]["metrics"]["macro_f1"] == 0.2
    model = client.get_logged_model(version.model_id)
    assert {(m.key, m.dataset_name) for m in model.metrics} >= {("sentiment/macro_f1", "finance/test.jsonl")}
    assert [m.model_id for m in client.get_run(version.run_id).outputs.model_outputs] == [version.model_id]
    found = client.search_logged_models([model.experiment_id], "metrics.`sentiment/macro_f1` > 0.8")
    assert version.model_id in [each.model_id for each in found]


def test_release_records_tell_every_move_with_its_figures(registry, client, name, tmp_path):
    for seed in (1, 2):
        registry.register(new_version(registry, tmp_path, name, f"step-{seed}", seed))
    registry.promote(name, 1, None, "first", {"sentiment/macro_f1": 0.9})
    registry.promote(name, 2, 1, "better by 0.02", {"sentiment/macro_f1": 0.92})
    registry.rollback(name, 2, "slower")
    experiment = client.get_experiment_by_name("releases").experiment_id
    order = ["attributes.start_time ASC"]
    runs = client.search_runs([experiment], f"tags.`release.name` = '{name}'", order_by=order)
    told = [
        (r.data.tags["release.kind"], r.data.tags["release.from"], r.data.tags["release.to"]) for r in runs
    ]
    assert told == [("promote", "0", "1"), ("promote", "1", "2"), ("rollback", "2", "1")]
    assert runs[1].data.tags["release.reason"] == "better by 0.02"
    assert runs[1].data.metrics == {"sentiment/macro_f1": 0.92}
    assert runs[1].data.tags["adapter.digest"] == registry.version(name, "2").digest
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_two_promotions_at_once_one_wins_one_conflicts(registry, name, tmp_path):
    for seed in (1, 2):
        registry.register(new_version(registry, tmp_path, name, f"step-{seed}", seed))
    outcomes = []

    def promote(version):
        try:
            MlflowRegistry(registry.url, tmp_path / "lock").promote(name, version, None, "race", {})
            outcomes.append(version)
        except RegistryConflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=promote, args=(version,)) for version in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = registry.version(name, "champion").version
    assert sorted(outcomes, key=str) == sorted([winner, "conflict"], key=str)


def test_evaluation_with_nan_and_chinese_labels_is_valid_json_and_is_drawn(registry, client, name, tmp_path):
    run = registry.start_run(name, "jobs", "job", {}, {})
    score = classification("情感", macro_f1=float("nan"))
    registry.log_evaluation(run, [replace(score, report=replace(score.report, labels=("负", "中", "正")))])
    folder = "evaluation/情感"
    report = json.loads(text(client, run, f"{folder}/report.json", tmp_path))
    assert report["metrics"]["macro_f1"] == "nan"
    assert f"{folder}/confusion.png" in [file.path for file in client.list_artifacts(run, folder)]


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        (("", "finance", "macro_f1"), "finance/macro_f1"),
        (("base", "rec", "hit@1"), "base/rec/hit_at_1"),
        (("", "chat", "rouge-L (f)"), "chat/rouge-L _f_"),
    ],
)
def test_metric_key_holds_only_what_mlflow_allows(parts, key):
    assert metric_key(*parts) == key


def test_runs_of_one_experiment_that_name_the_same_new_data_at_once_all_have_it(registry, client):
    """MLflow looks whether a data set is there and then adds it: the second who adds it fails."""
    experiment, count = f"inputs-{uuid4().hex}", 6
    runs = [registry.start_run(f"{experiment}-{n}", experiment, f"run-{n}", {}, {}) for n in range(count)]
    together = threading.Barrier(count, timeout=30)

    def tell(run: str) -> None:
        for number in range(8):
            together.wait()
            registry.log_inputs(run, {f"context-{number}": (f"data/{experiment}/{number}", "0" * 64)})

    with ThreadPoolExecutor(count) as pool:
        for told in [pool.submit(tell, run) for run in runs]:
            told.result()
    for run in runs:
        inputs = client.get_run(run).inputs.dataset_inputs
        assert len({each.dataset.name for each in inputs}) == len(inputs) == 8
