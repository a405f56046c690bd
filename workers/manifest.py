"""Folders that are complete or absent: written aside, fsynced, renamed, with a manifest of digests.

Owns `manifest.json` (SHA-256 and size of every file). Standard library only, so that both sides of the
process boundary verify bytes with the same code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
"""Over everything else in a folder, the manifest included; so no manifest can list it."""


class CorruptFolder(Exception):
    """A folder's bytes do not match its manifest; the message names the first file that differs."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Relative path -> {sha256, bytes} of every file below `folder` except the manifest and its signature.

    `known` are SHA-256 that were taken while the files were written: those are not read again.
    """
    unlisted = {folder / SIGNATURE, folder / f".{SIGNATURE}"}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in files if path not in unlisted}
    digests = known or {}
    return {
        name: {"sha256": digests.get(name) or file_digest(path), "bytes": path.stat().st_size}
        for name, path in names.items()
    }


@contextmanager
def publish_folder(
    final: Path, extra: Mapping[str, Any] | None = None, known: Mapping[str, str] | None = None
) -> Generator[Path]:
    """Yield a scratch folder beside `final`; on success add its manifest, fsync and rename it into place.

    A reader sees the whole folder or none. `extra` is stored in the manifest under its own keys; `known` may
    be filled while the folder is written, as in `folder_files`.
    Raises FileExistsError if `final` exists, or comes meanwhile: a published folder is never changed.
    """
    if final.exists():
        raise _taken(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = final.parent / f".{final.name}.{uuid4().hex}"
    scratch.mkdir()
    try:
        yield scratch
        manifest = {**(extra or {}), "files": folder_files(scratch, known)}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        _fsync_tree(scratch)
        _rename(scratch, final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _rename(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise _taken(final) from error


def _taken(final: Path) -> FileExistsError:
    return FileExistsError(f"{final} exists already; a published folder is never overwritten")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder. Raises CorruptFolder if there is none, or of something else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CorruptFolder(f"{folder} has no readable {MANIFEST}: {error}") from error
    if not _lists_digests(manifest):
        raise CorruptFolder(f"{folder / MANIFEST} lists no files with their digests: it is of something else")
    return manifest


def _lists_digests(manifest: Any) -> bool:
    try:
        return all(entry["sha256"] for entry in manifest["files"].values())
    except (KeyError, TypeError, AttributeError):
        return False


def verify_folder(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after checking every digest. Raises CorruptFolder otherwise."""
    manifest = read_manifest(folder)
    found = folder_files(folder)
    for name in sorted(manifest["files"].keys() | found.keys()):
        if manifest["files"].get(name) != found.get(name):
            raise CorruptFolder(f"{folder / name} does not match the digest in {MANIFEST}")
    return manifest


def verify_listed(folder: Path) -> dict[str, Any]:
    """As `verify_folder`, but others may have added files: MLflow does to a version that it has fetched."""
    manifest = read_manifest(folder)
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise CorruptFolder(f"{path} does not match the digest in {MANIFEST}")
    return manifest


def folder_digest(folder: Path) -> str:
    """One SHA-256 over the names and digests of every file of a folder, manifest excluded."""
    return files_digest(folder_files(folder))


def files_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """`folder_digest` of a folder whose manifest has these `files`."""
    return json_digest({name: entry["sha256"] for name, entry in files.items()})


def remove_scratch(parent: Path, abandoned_seconds: float = 0.0) -> None:
    """Remove what a killed writer left beside published folders.

    Where others may be writing just now, only that in which nothing was written for `abandoned_seconds`.
    """
    for path in parent.glob(".*.*"):
        if path.is_dir() and len(path.suffix) == 33 and _age(path) >= abandoned_seconds:
            shutil.rmtree(path, ignore_errors=True)


def _age(folder: Path) -> float:
    """Seconds since anything in it was written; none if it goes away meanwhile."""
    try:
        return max(0.0, time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))))
    except OSError:
        return 0.0


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
