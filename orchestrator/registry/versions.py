"""Adapter versions in MLflow, read: by name, number or alias, with their tags, aliases and metrics.

Owns the names of the tags that bind a version to its step and its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, NoSuchVersion
from orchestrator.registry.client import PAGE, is_absent, pages, quoted
from workers.types import BadInput

STEP_TAG = "chorus.step_id"
ADAPTER_TAG = "adapter.digest"
MANIFEST_TAG = "manifest.digest"
GATE_TAG = "gate.status"
PARENTS_TAG = "fusion.parents"
FIXED_TAGS = frozenset({STEP_TAG, ADAPTER_TAG, MANIFEST_TAG, PARENTS_TAG})


def model_id_of(version: ModelVersion) -> str:
    """MLflow returns no `model_id` with a version; its source names it."""
    return str(version.source).removeprefix("models:/")


def all_versions(client: MlflowClient, name: str | None) -> list[AdapterVersion]:
    """Versions of one name or of all, by name and number, without those that chorus did not register."""
    names = [name] if name else [m.name for m in pages(client.search_registered_models, max_results=PAGE)]
    found = [version for each in sorted(names) for version in _versions_of(client, each)]
    return sorted(found, key=lambda version: (version.name, version.version))


def _versions_of(client: MlflowClient, name: str) -> Iterator[AdapterVersion]:
    aliases = aliases_of(client, name)
    for version in pages(
        client.search_model_versions, filter_string=f"name = {quoted(name)}", max_results=PAGE
    ):
        if _is_ours(version):
            yield read_version(client, version, aliases)


def one_version(client: MlflowClient, name: str, ref: str) -> AdapterVersion:
    """The version by number or alias. Raises NoSuchVersion."""
    return read_version(client, get_version(client, name, ref), aliases_of(client, name))


def get_version(client: MlflowClient, name: str, ref: str) -> ModelVersion:
    try:
        if ref.isdigit():
            version = client.get_model_version(name, ref)
        else:
            version = client.get_model_version_by_alias(name, ref)
    except MlflowException as error:
        if not is_absent(error) and error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise NoSuchVersion(
            f"{name} has no version or alias {ref!r}; `chorus adapters list` shows them"
        ) from error
    if not _is_ours(version):
        raise NoSuchVersion(f"{name}/{version.version} was not registered by chorus")
    return version


def _is_ours(version: ModelVersion) -> bool:
    return FIXED_TAGS - {PARENTS_TAG} <= version.tags.keys()


def aliases_of(client: MlflowClient, name: str) -> Mapping[str, str]:
    """Alias -> version number of a registered name; none if the name is unknown."""
    try:
        model: Any = client.get_registered_model(name)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return {}
    return model.aliases


def read_version(client: MlflowClient, version: ModelVersion, aliases: Mapping[str, str]) -> AdapterVersion:
    """`version` with the aliases and metrics that MLflow keeps elsewhere."""
    model = client.get_logged_model(model_id_of(version))
    return AdapterVersion(
        name=version.name,
        version=int(version.version),
        model_id=str(model.model_id),
        run_id=str(version.run_id),
        digest=version.tags[ADAPTER_TAG],
        tags=dict(version.tags),
        aliases=tuple(
            sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))
        ),
        metrics={metric.key: metric.value for metric in model.metrics or []},
        created_ms=int(version.creation_timestamp or 0),
    )


def set_tags(client: MlflowClient, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Add or change tags of a version, except those that bind it to its bytes."""
    get_version(client, name, str(version))
    fixed = FIXED_TAGS & tags.keys()
    if fixed:
        raise BadInput(f"the tag {min(fixed)} of {name}/{version} cannot be changed; register a new version")
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)
