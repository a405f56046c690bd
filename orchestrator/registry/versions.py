"""Adapter versions in MLflow, read: by name, number or alias, with their tags, aliases and metrics.

Owns the names of the tags that bind a version to its step and its bytes.
"""

from __future__ import annotations

import json
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
PARENTS_TAG = "fusion.parents"
LINK_TAG = "mlflow.modelVersions"
"""MLflow's own link from a LoggedModel to its versions, as `mlflow.register_model` writes it."""
CONDITIONS_TAG = "chorus.conditions"
"""Of a registered name: what all its versions must meet."""
BINDING_TAGS = frozenset({STEP_TAG, ADAPTER_TAG, MANIFEST_TAG})
FIXED_TAGS = BINDING_TAGS | {PARENTS_TAG}


def model_id_of(version: ModelVersion) -> str:
    """MLflow returns no `model_id` with a version; its source names it."""
    return str(version.source).removeprefix("models:/")


def all_versions(client: MlflowClient, name: str | None) -> list[AdapterVersion]:
    """Versions of one name or of all, by name and number, without those that chorus did not register."""
    found = [version for each in names_of(client, name) for version in _versions_of(client, each)]
    return sorted(found, key=lambda version: (version.name, version.version))


def names_of(client: MlflowClient, name: str | None) -> list[str]:
    """`name` alone, or every registered name."""
    if name is not None:
        return [name]
    return sorted(model.name for model in pages(client.search_registered_models, max_results=PAGE))


def _stored(client: MlflowClient, name: str) -> Iterator[ModelVersion]:
    wanted = f"name = {quoted(name)}"
    yield from pages(client.search_model_versions, filter_string=wanted, max_results=PAGE)


def runs_of(client: MlflowClient, name: str) -> list[str]:
    """The run of each version, oldest version first."""
    found = sorted(_stored(client, name), key=lambda version: int(version.version))
    return [str(version.run_id) for version in found if version.run_id]


def known_versions(client: MlflowClient) -> Iterator[tuple[str, int]]:
    """Name and number of every version that chorus registered; without its metrics, a request each."""
    for name in names_of(client, None):
        yield from ((name, int(version.version)) for version in _stored(client, name) if _is_ours(version))


def unbound_versions(client: MlflowClient, name: str) -> Iterator[tuple[int, list[str]]]:
    """Versions that chorus made and that have lost a binding tag, with the tags that are missing."""
    for version in _stored(client, name):
        lost = sorted(BINDING_TAGS - version.tags.keys())
        if lost and len(lost) < len(BINDING_TAGS):
            yield int(version.version), lost


def parents_of(version: AdapterVersion) -> list[tuple[str, int]]:
    """Name and number of each parent of a fused version."""
    parents = filter(None, version.tags.get(PARENTS_TAG, "").split(","))
    return [(name, int(number)) for name, _, number in (parent.rpartition("/") for parent in parents)]


def _versions_of(client: MlflowClient, name: str) -> Iterator[AdapterVersion]:
    aliases = aliases_of(client, name)
    for version in _stored(client, name):
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
    return version.tags.keys() >= BINDING_TAGS


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
    model_id = model_id_of(version)
    return AdapterVersion(
        name=version.name,
        version=int(version.version),
        model_id=model_id,
        run_id=str(version.run_id),
        digest=version.tags[ADAPTER_TAG],
        tags=dict(version.tags),
        aliases=tuple(
            sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))
        ),
        metrics=_metrics_of(client, model_id),
        created_ms=int(version.creation_timestamp or 0),
    )


def _metrics_of(client: MlflowClient, model_id: str) -> dict[str, float]:
    """None if somebody deleted the model: reading the version's files then says so."""
    try:
        model = client.get_logged_model(model_id)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return {}
    return {metric.key: metric.value for metric in model.metrics or []}


def conditions_of(client: MlflowClient, name: str) -> dict[str, Any]:
    """What was set for a whole name; nothing for an unknown one."""
    try:
        model: Any = client.get_registered_model(name)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return {}
    return json.loads(model.tags.get(CONDITIONS_TAG, "{}"))


def set_conditions(client: MlflowClient, name: str, conditions: Mapping[str, Any]) -> None:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if not is_absent(error):
            raise
        raise NoSuchVersion(
            f"no adapter is registered as {name}; `chorus adapters list` shows them"
        ) from error
    untyped: Any = client
    untyped.set_registered_model_tag(name, CONDITIONS_TAG, json.dumps(dict(conditions), sort_keys=True))


def set_tags(client: MlflowClient, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Add or change tags of a version, except those that bind it to its bytes."""
    get_version(client, name, str(version))
    fixed = FIXED_TAGS & tags.keys()
    if fixed:
        raise BadInput(f"the tag {min(fixed)} of {name}/{version} cannot be changed; register a new version")
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)
