"""The whole registry against what was registered: altered bytes and tags, deleted versions, moved champions.

Anyone who reaches the MLflow server can overwrite a file, delete a version or move an alias. Nothing here
repairs: it says what is not as it was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, Problem, RegistryConflict
from orchestrator.registry.artifacts import check_bytes
from orchestrator.registry.client import PAGE, pages
from orchestrator.registry.promotion import CHAMPION
from orchestrator.registry.releases import history
from orchestrator.registry.versions import (
    LINK_TAG,
    STEP_TAG,
    aliases_of,
    all_versions,
    known_versions,
    names_of,
    parents_of,
    unbound_versions,
)


def audit(client: MlflowClient, name: str | None) -> list[Problem]:
    """What was altered under one name, or under all; versions in their order, then what is gone."""
    names = names_of(client, name)
    versions = all_versions(client, name)
    known = set(known_versions(client))
    found = [problem for version in versions for problem in _version(client, version, known)]
    for each in names:
        found += _unbound(client, each)
        found += _champion(client, each, known)
    found += _deleted(client, name, known)
    return list(dict.fromkeys(found))


def _version(client: MlflowClient, version: AdapterVersion, known: set[tuple[str, int]]) -> Iterator[Problem]:
    try:
        check_bytes(client, version)
    except RegistryConflict as error:
        words = str(error).removeprefix(f"{version.name}/{version.version} ")
        yield Problem(version.name, version.version, words)
    for parent in parents_of(version):
        if parent not in known:
            words = f"its parent {parent[0]}/{parent[1]} is no longer in the registry"
            yield Problem(version.name, version.version, words)


def _unbound(client: MlflowClient, name: str) -> Iterator[Problem]:
    for version, tags in unbound_versions(client, name):
        yield Problem(name, version, f"it lacks the tags {', '.join(tags)} that bind it to its bytes")


def _champion(client: MlflowClient, name: str, known: set[tuple[str, int]]) -> Iterator[Problem]:
    """The alias beside the release record, and champions of the past that are gone."""
    records = history(client, name)
    moves = [record for record in records if record.done]
    if not moves:
        return
    alias, last = aliases_of(client, name).get(CHAMPION), moves[-1]
    under_way = {record.target for record in records if not record.done}
    if alias is None or int(alias) not in {last.target, *under_way}:
        now = "nothing" if alias is None else f"version {alias}"
        words = f"champion is {now}, but its release record says version {last.target}, moved by {last.who}"
        yield Problem(name, last.target, words)
    for target in sorted({record.target for record in moves}):
        if (name, target) not in known:
            yield Problem(name, target, "it was released as champion and has been deleted")


def _deleted(client: MlflowClient, name: str | None, known: set[tuple[str, int]]) -> Iterator[Problem]:
    """Versions that the stored models name and the registry no longer has."""
    untyped: Any = client
    experiments = [e.experiment_id for e in pages(untyped.search_experiments, max_results=PAGE)]
    for experiment in experiments:
        for model in pages(client.search_logged_models, experiment_ids=[experiment]):
            if STEP_TAG not in model.tags:
                continue
            for link in json.loads(model.tags.get(LINK_TAG, "[]")):
                version = (str(link["name"]), int(link["version"]))
                if version not in known and name in (None, version[0]):
                    words = f"it has been deleted; its files are still in the model {model.model_id}"
                    yield Problem(*version, words)
