"""`Registry` over MLflow: one method a line, each done by the file that owns its subject.

Turns a server that does not answer into RegistryUnreachable; nothing else is decided here. Import it late: it
imports mlflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.contracts import (
    AdapterVersion,
    MetricPoint,
    NewVersion,
    Problem,
    ReleaseRecord,
    Scores,
)
from orchestrator.registry import artifacts as mlflow_artifacts
from orchestrator.registry import audit as mlflow_audit
from orchestrator.registry import promotion, releases
from orchestrator.registry import register as mlflow_register
from orchestrator.registry import runs as mlflow_runs
from orchestrator.registry import versions as mlflow_versions
from orchestrator.registry.client import connect, reaching


class MlflowRegistry:
    """Runs, versions and aliases on the tracking server at `url`.

    `lock`: a file all commands of one home share, so that two promotions never interleave.
    """

    def __init__(self, url: str, lock: Path | None = None) -> None:
        self.url = url
        self._lock = lock
        self._client = connect(url)

    # ---- runs ----

    def start_run(
        self, key: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        with reaching(self.url):
            return mlflow_runs.start_run(self._client, key, experiment, name, params, tags)

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        with reaching(self.url):
            mlflow_runs.log_points(self._client, run_id, points)

    def log_inputs(self, run_id: str, datasets: Mapping[str, tuple[str, str]]) -> None:
        with reaching(self.url):
            mlflow_runs.log_inputs(self._client, run_id, datasets)

    def log_evaluation(self, run_id: str, scores: Sequence[Scores], prefix: str = "") -> None:
        with reaching(self.url):
            mlflow_runs.log_evaluation(self._client, run_id, scores, prefix)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        with reaching(self.url):
            self._client.log_text(run_id, text, path)

    def end_run(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        with reaching(self.url):
            self._client.set_terminated(run_id, status)

    # ---- versions ----

    def register(self, new: NewVersion) -> AdapterVersion:
        with reaching(self.url):
            return mlflow_register.register(self._client, new)

    def versions(self, name: str | None = None) -> Sequence[AdapterVersion]:
        with reaching(self.url):
            return mlflow_versions.all_versions(self._client, name)

    def version(self, name: str, ref: str) -> AdapterVersion:
        with reaching(self.url):
            return mlflow_versions.one_version(self._client, name, ref)

    def download(self, version: AdapterVersion, to: Path) -> Path:
        with reaching(self.url):
            return mlflow_artifacts.download(self._client, version, to)

    def read_text(self, version: AdapterVersion, path: str) -> str:
        with reaching(self.url):
            return mlflow_artifacts.read_text(self._client, version, path)

    def set_tags(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        with reaching(self.url):
            mlflow_versions.set_tags(self._client, name, version, tags)

    # ---- aliases ----

    def set_alias(self, name: str, alias: str, version: int) -> None:
        with reaching(self.url):
            promotion.set_alias(self._client, name, alias, version)

    def promote(
        self,
        name: str,
        version: int,
        expected_champion: int | None,
        reason: str,
        figures: Mapping[str, float],
    ) -> AdapterVersion:
        with reaching(self.url), promotion.one_writer(self._lock):
            return promotion.promote(self._client, name, version, expected_champion, reason, figures)

    def rollback(self, name: str, expected_champion: int | None, reason: str) -> AdapterVersion:
        with reaching(self.url), promotion.one_writer(self._lock):
            return promotion.rollback(self._client, name, expected_champion, reason)

    def finish_move(self, name: str) -> Sequence[ReleaseRecord]:
        with reaching(self.url), promotion.one_writer(self._lock):
            return promotion.finish_move(self._client, name)

    def history(self, name: str) -> Sequence[ReleaseRecord]:
        with reaching(self.url):
            return releases.history(self._client, name)

    # ---- what holds for a whole name, or for all ----

    def conditions(self, name: str) -> Mapping[str, Any]:
        with reaching(self.url):
            return mlflow_versions.conditions_of(self._client, name)

    def set_conditions(self, name: str, conditions: Mapping[str, Any]) -> None:
        with reaching(self.url):
            mlflow_versions.set_conditions(self._client, name, conditions)

    def audit(self, name: str | None = None) -> Sequence[Problem]:
        with reaching(self.url):
            return mlflow_audit.audit(self._client, name)
