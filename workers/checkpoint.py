"""Save and load one job: adapter, optimizer and counters in a folder that is complete or absent.

A checkpoint is `<checkpoint_dir>/step-<n>/`: PEFT's two files, `optimizer.safetensors`, `progress.json`, and
a manifest of digests. The sample order and the dropout masks are functions of the job's seed and step, so
nothing else is needed to go on bit for bit. Never unpickles.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from workers.adapter import Adapter, read_adapter, write_adapter
from workers.fuse.grams import write_grams
from workers.manifest import MANIFEST, CorruptFolder, publish_folder, remove_scratch, verify_folder
from workers.tensors import save_tensors

KEPT = 2
ABANDONED_SECONDS = 3600.0
"""A scratch folder without a write for so long has no writer; before, it may be another host's."""
STEM = "step-"
"""What the names of checkpoints begin with."""
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    step: int
    """Steps done, bad ones included."""
    bad_steps: int
    """Bad ones in a row, up to now."""
    reports: tuple[dict[str, Any], ...] = ()
    """Fields of the latest StepDone: told again by whoever resumes from this one, for a listener that was
    gone may not have heard them."""
    validations: tuple[dict[str, Any], ...] = ()
    """Fields of the latest Validated, for the same reason."""


@dataclass(frozen=True)
class Checkpoint:
    adapter: Adapter
    optimizer: dict[str, Tensor]
    progress: Progress


def save(folder: Path, checkpoint: Checkpoint, base_digest: str) -> Path:
    """Publish `step-<n>` and drop all but the newest two that verify. Returns its path.

    A step that is there already is left as it is: the same step has the same weights.
    """
    final = path_of(folder, checkpoint.progress.step)
    if final.exists() and _verifies(final):
        return final
    shutil.rmtree(final, ignore_errors=True)
    with _published(final, {"base_digest": base_digest, "step": checkpoint.progress.step}) as scratch:
        write_adapter(checkpoint.adapter, scratch)
        save_tensors(checkpoint.optimizer, scratch / OPTIMIZER)
        (scratch / PROGRESS).write_text(json.dumps(asdict(checkpoint.progress)) + "\n")
    _prune(folder)
    return final


def save_adapter(
    final: Path, adapter: Adapter, base_digest: str, grams: Mapping[str, Tensor] | None = None
) -> None:
    """Publish the finished adapter in PEFT's layout with a manifest, and its Gram matrices if it has some."""
    if final.exists() and _verifies(final):
        return
    shutil.rmtree(final, ignore_errors=True)
    with _published(final, {"base_digest": base_digest}) as scratch:
        write_adapter(adapter, scratch)
        if grams:
            write_grams(grams, scratch)


@contextmanager
def _published(final: Path, extra: Mapping[str, Any]) -> Generator[Path]:
    """`publish_folder`, done too if another writer was first: a host that was given up may write still."""
    try:
        with publish_folder(final, extra) as scratch:
            yield scratch
    except OSError as error:
        taken = isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY
        if not (taken and _verifies(final)):
            raise


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{STEM}{step:06d}"


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose bytes match its manifest; torn ones are passed over."""
    return next((path for path in _newest_first(folder) if _verifies(path)), None)


def load(path: Path) -> Checkpoint:
    """Raises CorruptFolder if a byte differs from the manifest."""
    verify_folder(path)
    fields = json.loads((path / PROGRESS).read_text())
    told = {key: tuple(fields.get(key, ())) for key in ("reports", "validations")}
    progress = Progress(**{**fields, **told})
    return Checkpoint(read_adapter(path), load_file(path / OPTIMIZER), progress)


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob(f"{STEM}*"), reverse=True))


def _verifies(path: Path) -> bool:
    try:
        verify_folder(path)
    except (CorruptFolder, OSError):
        return False
    return True


def _prune(folder: Path) -> None:
    """Also what a kill has left of a writer or of a removal: no torn step older than those kept is read."""
    good = 0
    for path in _newest_first(folder):
        if good == KEPT:
            shutil.rmtree(path, ignore_errors=True)
        elif _verified(path):
            good += 1
    remove_scratch(folder, ABANDONED_SECONDS)


def _verified(path: Path) -> bool:
    """`_verifies`, once: hashing all that is kept at every save would cost more than the save."""
    try:
        written = (path / MANIFEST).stat()
    except OSError:
        return False
    return _verified_as_written(path, written.st_ino, written.st_mtime_ns)


@lru_cache(maxsize=1024)
def _verified_as_written(path: Path, _inode: int, _written_ns: int) -> bool:
    return _verifies(path)
