"""A writer killed at any request leaves nothing half-written; the next call ends with one whole result."""

import json
import subprocess
import sys

import pytest

from tests.contract.samples import new_version, shared_server


@pytest.fixture
def registry():
    from orchestrator.registry.registry import MlflowRegistry

    return MlflowRegistry(shared_server().url)


@pytest.fixture
def client(registry):
    from mlflow.tracking import MlflowClient

    return MlflowClient(registry.url)


def killed_names(folder, verb) -> list[str]:
    """The name of each killed writer; the last one was let live."""
    command = [
        sys.executable,
        "-m",
        "tests.integration.killed_writer",
        shared_server().url,
        str(folder),
        verb,
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_register_killed_at_each_request_then_repeated_gives_one_whole_version(registry, client, tmp_path):
    names = killed_names(tmp_path, "register")
    assert len(names) > 8
    for index, name in enumerate(names):
        for half in registry.versions(name):
            registry.download(half, tmp_path / f"seen-{index}")
        version = registry.register(new_version(registry, tmp_path / f"again-{index}", name))
        assert [v.version for v in registry.versions(name)] == [1]
        registry.download(version, tmp_path / f"out-{index}")
        experiment = client.get_run(version.run_id).info.experiment_id
        models = client.search_logged_models([experiment], f"source_run_id = '{version.run_id}'")
        assert [(m.model_id, m.status) for m in models] == [(version.model_id, "READY")]
        assert json.loads(models[0].tags["mlflow.modelVersions"]) == [{"name": name, "version": 1}]


def test_promote_killed_at_each_request_then_repeated_moves_once(registry, tmp_path):
    names = killed_names(tmp_path, "promote")
    assert len(names) > 4
    for name in names:
        assert registry.version(name, "champion").version in (1, 2)
        assert registry.promote(name, 2, 1, "better", {"macro_f1": 0.9}).version == 2
        assert registry.version(name, "previous").version == 1
        assert releases(registry, name) == [("0", "1", "FINISHED"), ("1", "2", "FINISHED")]


def test_rollback_killed_at_each_request_then_repeated_swaps_once(registry, tmp_path):
    names = killed_names(tmp_path, "rollback")
    assert len(names) > 4
    for name in names:
        assert registry.rollback(name, 2, "worse").version == 1
        assert registry.version(name, "previous").version == 2
        assert releases(registry, name) == [
            ("0", "1", "FINISHED"),
            ("1", "2", "FINISHED"),
            ("2", "1", "FINISHED"),
        ]


def releases(registry, name):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(registry.url)
    experiment = client.get_experiment_by_name("releases").experiment_id
    runs = client.search_runs(
        [experiment], f"tags.`release.name` = '{name}'", order_by=["attributes.start_time ASC"]
    )
    return [(r.data.tags["release.from"], r.data.tags["release.to"], r.info.status) for r in runs]
