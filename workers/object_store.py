"""Published folders in an object store: whole or absent there too, verified on the way up and down.

The only `import fsspec`; imported once someone has named a store. A store knows no rename: the files of a
folder go up first and are verified, its manifest goes up last, and a folder without one is absent. No folder
is written over another: `step-000012` goes to `step-000012.<id>`, named by the digest of its manifest. So a
writer that was killed, or that lags behind another, tears none but its own, and one put twice is there once.
"""

# fsspec has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from workers.manifest import MANIFEST, CorruptFolder, file_digest, files_digest, publish_folder
from workers.types import CheckpointsAway

Entries = Mapping[str, Mapping[str, Any]]
"""Of a manifest: name -> sha256 and bytes."""
ID_DIGITS = 16
OF_THE_USER = ("Credentials", "Validation", "Region", "Profile")
"""In the names of botocore's errors that no waiting mends: it derives them from nothing that says so."""


@dataclass(frozen=True)
class Stored:
    """A whole folder of a store."""

    name: str
    """As it was named on the disk."""
    place: str
    """Where it lies in the store."""
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """As `manifest.folder_digest` of the folder."""
        return files_digest(self.manifest["files"])


class ObjectStore:
    """The folders that lie side by side below one URL.

    Every method raises CheckpointsAway if the store does not answer, or not as it should; a full disk of this
    machine stays an OSError of its own.
    """

    def __init__(self, url: str) -> None:
        self._shown = shown(url)
        with self._asked():
            self._fs, self._root = _opened(url)

    def put(self, folder: Path) -> None:
        """Copy a published folder; on return it is whole in the store, and verified there.

        What the store has already is not sent again, what it has no longer as it was put is. Verified is
        every file's size, and its MD5 where the store's ETag is that (an S3 object that was put in one piece
        and is not encrypted with a key of the user's); otherwise it is read back for its SHA-256, as the
        manifest is always. That a file it has taken is durable, the store itself promises.
        """
        text = (folder / MANIFEST).read_bytes()
        place = self._place(f"{folder.name}.{_id(text)}")
        files: Entries = json.loads(text)["files"]
        with self._asked():
            lacking = self._lacking(place, folder, files)
            for name in lacking:
                self._fs.put_file(str(folder / name), f"{place}/{name}")
            wrong = self._lacking(place, folder, lacking)
            if not wrong and self._manifest(place, self._listed(place)) is None:
                self._fs.pipe_file(f"{place}/{MANIFEST}", text)
                wrong = {MANIFEST: {}} if self._fs.cat_file(f"{place}/{MANIFEST}") != text else {}
            if wrong:
                name = f"{folder.name}/{next(iter(wrong))}"
                raise CheckpointsAway(f"{self._shown} does not hold {name} as it was put")

    def whole(self, prefix: str) -> Iterator[Stored]:
        """Folders whose names begin so, by name, the last first: their manifest can be read, and every file
        has its size. Whether its bytes are right, `fetch` sees."""
        with self._asked():
            found = self._folders()
        for folder in sorted((name for name in found if name.startswith(prefix)), reverse=True):
            with self._asked():
                manifest = self._manifest(self._place(folder), found[folder])
            if manifest is not None:
                yield Stored(folder.rpartition(".")[0], self._place(folder), manifest)

    def fetch(self, stored: Stored, final: Path) -> None:
        """Publish a folder at `final`. Raises CorruptFolder if a byte is not what its manifest says, and as
        `publish_folder`."""
        files: Entries = stored.manifest["files"]
        extra = {key: value for key, value in stored.manifest.items() if key != "files"}
        known: dict[str, str] = {}
        with publish_folder(final, extra, known) as scratch:
            for name, entry in files.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                with self._asked():
                    self._fs.get_file(f"{stored.place}/{name}", str(scratch / name))
                if file_digest(scratch / name) != entry["sha256"]:
                    raise CorruptFolder(
                        f"{self._shown}: {name} of {stored.name} is not what its manifest says"
                    )
                known[name] = entry["sha256"]

    def prune(self, prefix: str, keep: int) -> None:
        """Remove what lies before the last `keep` whole folders of such names, torn ones included."""
        kept = list(islice(self.whole(prefix), keep))
        if len(kept) < keep:
            return
        with self._asked():
            for folder, files in sorted(self._folders().items()):
                if folder.startswith(prefix) and self._place(folder) < kept[-1].place:
                    self._remove(self._place(folder), files)

    # ---- in the file system ----------------------------------------------------------------------------

    def _place(self, folder: str) -> str:
        return f"{self._root}/{folder}"

    def _listed(self, place: str) -> dict[str, dict[str, Any]]:
        """Name relative to `place` -> what the store tells, of every object below it."""
        found: dict[str, dict[str, Any]] = self._fs.find(place, detail=True)
        return {path[len(place) + 1 :]: info for path, info in found.items()}

    def _folders(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Every folder, whole or torn, with what it holds."""
        folders: dict[str, dict[str, dict[str, Any]]] = {}
        for path, info in self._listed(self._root).items():
            folder, _, name = path.partition("/")
            folders.setdefault(folder, {})[name] = info
        return folders

    def _manifest(self, place: str, found: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Of a whole folder that holds `found`; None of any other."""
        if MANIFEST not in found:
            return None
        text: bytes = self._fs.cat_file(f"{place}/{MANIFEST}")
        if _id(text) != place.rpartition(".")[2]:
            return None
        manifest: Mapping[str, Any] = json.loads(text)
        files: Entries = manifest["files"]
        whole = all(_stays_inside(name) and _size(found.get(name)) == files[name]["bytes"] for name in files)
        return manifest if whole else None

    def _lacking(self, place: str, folder: Path, files: Entries) -> Entries:
        """Of these files of a folder those that the store does not hold, or not as they are."""
        found = self._listed(place) if files else {}
        return {
            name: entry
            for name, entry in files.items()
            if not self._holds(f"{place}/{name}", found.get(name), folder / name, entry["sha256"])
        }

    def _holds(self, place: str, info: Mapping[str, Any] | None, path: Path, sha256: str) -> bool:
        if info is None or _size(info) != path.stat().st_size:
            return False
        if _etag(info) == _md5(path):
            return True
        with self._fs.open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256

    def _remove(self, place: str, files: Mapping[str, Any]) -> None:
        """The manifest first: a folder of which this is all that was done is absent."""
        if MANIFEST in files:
            self._fs.rm_file(f"{place}/{MANIFEST}")
        if files.keys() - {MANIFEST}:
            self._fs.rm(place, recursive=True)

    @contextmanager
    def _asked(self) -> Generator[None]:
        """Whatever a driver raises (each its own) means that the store is away, but for a full disk here."""
        try:
            yield
        except CheckpointsAway:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointsAway(f"{self._shown}: {_words(error)}") from error


def problem(url: str) -> str | None:
    """Why checkpoints cannot be kept at `url`, and what to do; None if they can.

    Raises CheckpointsAway if it does not answer: it may later.
    """
    try:
        fs, root = _opened(url)
        # Nothing lies there. A list of it fails where there is no bucket, and is empty where there is one.
        fs.find(f"{root}/.nothing")
    except ImportError as error:
        todo = "for s3: pip install -c constraints.txt s3fs"
        return f"needs a package that is not installed ({_words(error)}); {todo}"
    except ValueError as error:
        return f"cannot be used: {_words(error)}; write s3://BUCKET/PREFIX, or another URL that fsspec knows"
    except FileNotFoundError as error:
        return f"is not there: {_words(error)}; make the bucket, or name one that exists"
    except PermissionError as error:
        return f"may not be read: {_words(error)}; give its driver the credentials for it"
    except Exception as error:
        if any(word in type(error).__name__ for word in OF_THE_USER):
            todo = "set what its driver needs (for s3: AWS_PROFILE, AWS_REGION ...)"
            return f"cannot be used: {_words(error)}; {todo}"
        raise CheckpointsAway(f"{shown(url)}: {_words(error)}") from error
    return None


def shown(url: str) -> str:
    """A URL without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its path there. What others write is seen: nothing is cached."""
    protocol = get_protocol(url)
    if "://" not in url:
        raise ValueError("it is no URL")
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    fs, root = url_to_fs(url, use_listings_cache=False, **options)
    if not root.strip("/"):
        raise ValueError("it names no bucket")
    return fs, root.rstrip("/")


def _id(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:ID_DIGITS]


def _size(info: Mapping[str, Any] | None) -> int | None:
    return info["size"] if info else None


def _etag(info: Mapping[str, Any]) -> str:
    return str(info.get("ETag", "")).strip('"')


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _stays_inside(name: str) -> bool:
    """Whether a file of a manifest, which others may have written, lies in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
