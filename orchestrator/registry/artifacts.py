"""The stored bytes of an adapter version: fetched, and believed only after their digests agree.

Owns reading from the artifact store. A file there can be overwritten by anyone who reaches the server, so
nothing leaves this module unverified except what `check_upload` and `stored_manifest` compare themselves.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import HTTPError

from orchestrator.contracts import AdapterVersion, NoSuchVersion, RegistryConflict
from orchestrator.judgement import GATE_TAG
from orchestrator.registry.client import is_absent, server_of
from orchestrator.registry.versions import ADAPTER_TAG, MANIFEST_TAG
from workers.manifest import (
    MANIFEST,
    CorruptFolder,
    file_digest,
    folder_digest,
    json_digest,
    publish_folder,
    verify_folder,
)


def download(client: MlflowClient, version: AdapterVersion, to: Path) -> Path:
    """The adapter's files in `to`, verified; a folder that is there, or comes meanwhile, is used if right."""
    with suppress(FileExistsError):
        if not to.exists():
            return _publish(client, version, to)
    if folder_digest(to) != version.digest:
        raise RegistryConflict(
            f"{to} exists and is not {version.name}/{version.version}; choose another folder"
        )
    return to


def _publish(client: MlflowClient, version: AdapterVersion, to: Path) -> Path:
    """Raises FileExistsError if another has done it."""
    with tempfile.TemporaryDirectory() as scratch:
        stored = _fetch(client, version.model_id, "", Path(scratch))
        manifest = _verified(stored, version)
        with publish_folder(to) as folder:
            for name in manifest["adapter_files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stored / name, folder / name)
    return to


def check_bytes(client: MlflowClient, version: AdapterVersion) -> None:
    """Download and verify, keeping nothing. Raises RegistryConflict if a stored byte differs."""
    with tempfile.TemporaryDirectory() as scratch:
        _verified(_fetch(client, version.model_id, "", Path(scratch)), version)


def _verified(stored: Path, version: AdapterVersion) -> dict[str, Any]:
    """The manifest of a downloaded version once it agrees with the version's tags and all its files."""
    label = f"{version.name}/{version.version}"
    try:
        if file_digest(stored / MANIFEST) != version.tags[MANIFEST_TAG]:
            raise CorruptFolder(f"{MANIFEST} differs")
        manifest = verify_folder(stored)
    except (CorruptFolder, OSError) as error:
        reason = str(error).replace(f"{stored}/", "")
        raise RegistryConflict(f"{label} was altered in the registry: {reason}") from error
    adapter = {name: manifest["files"][name]["sha256"] for name in manifest["adapter_files"]}
    if json_digest(adapter) != version.digest:
        raise RegistryConflict(f"{label} was altered in the registry: its tag {ADAPTER_TAG} differs")
    for key, value in manifest["tags"].items():
        if key != GATE_TAG and version.tags.get(key) != value:
            raise RegistryConflict(f"{label} was altered in the registry: its tag {key} differs")
    return manifest


def read_text(client: MlflowClient, version: AdapterVersion, path: str) -> str:
    """One text file of a version, verified like the rest. Raises NoSuchVersion if it holds no such file."""
    with tempfile.TemporaryDirectory() as scratch:
        stored = _fetch(client, version.model_id, "", Path(scratch))
        if path not in (MANIFEST, *_verified(stored, version)["files"]):
            raise NoSuchVersion(f"{version.name}/{version.version} holds no file {path}")
        return (stored / path).read_text()


def check_upload(client: MlflowClient, model_id: str, manifest_digest: str) -> None:
    """Read a model's files back and compare them. Raises RegistryConflict."""
    with tempfile.TemporaryDirectory() as scratch:
        stored = _fetch(client, model_id, "", Path(scratch))
        try:
            verify_folder(stored)
        except CorruptFolder as error:
            raise RegistryConflict(f"the registry did not keep what was uploaded: {error}") from error
        if file_digest(stored / MANIFEST) != manifest_digest:
            raise RegistryConflict(f"the registry did not keep what was uploaded: {MANIFEST} differs")


def stored_manifest(client: MlflowClient, model_id: str) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return file_digest(_fetch(client, model_id, MANIFEST, Path(scratch)))
        except (OSError, RegistryConflict):
            return None


def _fetch(client: MlflowClient, model_id: str, path: str, to: Path) -> Path:
    """Artifacts of a LoggedModel below `path`, unverified. Raises RegistryConflict if they are not there.

    By the model's own location: a `models:/` address would be looked up on MLflow's global server.
    """
    location = _location(client, model_id)
    try:
        found = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location}/{path}".rstrip("/"), dst_path=str(to), tracking_uri=server_of(client)
        )
    except HTTPError as error:
        if error.response is None or error.response.status_code != 404:
            raise
        raise RegistryConflict(f"{model_id} has lost its file {path or '(all)'}") from error
    return Path(found)


def _location(client: MlflowClient, model_id: str) -> str:
    try:
        return str(client.get_logged_model(model_id).artifact_location)
    except MlflowException as error:
        if not is_absent(error):
            raise
        raise RegistryConflict(f"the model {model_id} with its files has been deleted") from error
