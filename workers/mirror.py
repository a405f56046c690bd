"""A job's checkpoints and adapter in its folder, and in the object store that its spec names, if any.

What is saved is published in the folder first, then put into the store; both have it when `save` returns.
What is resumed from lies in the folder: a newer checkpoint of the store is fetched. For a job without a store
nothing of this is imported.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from workers import checkpoint
from workers.adapter import Adapter
from workers.manifest import CorruptFolder
from workers.types import CheckpointsAway, JobSpec

if TYPE_CHECKING:
    from workers.object_store import ObjectStore

log = logging.getLogger(__name__)


def save(spec: JobSpec, state: checkpoint.Checkpoint, base_digest: str) -> None:
    """`checkpoint.save`, in the store as well; the newest two whole ones are kept in each."""
    path = checkpoint.save(Path(spec.checkpoint_dir), state, base_digest)
    if not spec.checkpoint_url:
        return
    store = _store(spec)
    store.put(path)
    with suppress(CheckpointsAway):  # it has what it was to have; the next save removes what is left
        store.prune(checkpoint.STEM, checkpoint.KEPT)


def save_adapter(
    spec: JobSpec, path: Path, adapter: Adapter, base_digest: str, grams: Mapping[str, Tensor] | None
) -> None:
    """`checkpoint.save_adapter`, in the store as well."""
    checkpoint.save_adapter(path, adapter, base_digest, grams)
    if spec.checkpoint_url:
        _store(spec).put(path)


def newest(spec: JobSpec) -> Path | None:
    """The newest checkpoint of the folder and the store, in the folder on return.

    One that the store lacks is put there: the attempt that wrote it may have ended before. Raises
    CheckpointsAway: what the store has may be newer than what is here.
    """
    here = checkpoint.newest(Path(spec.checkpoint_dir))
    return _newest(_store(spec), spec, here) if spec.checkpoint_url else here


def _newest(store: ObjectStore, spec: JobSpec, here: Path | None) -> Path | None:
    for stored in store.whole(checkpoint.STEM):
        if here is not None and stored.name <= here.name:
            break
        final = Path(spec.checkpoint_dir) / stored.name
        shutil.rmtree(final, ignore_errors=True)  # torn, or it would be `here`
        try:
            store.fetch(stored, final)
        except CorruptFolder as error:
            log.warning("a checkpoint is passed over: %s", error)
        else:
            return final
    if here is not None:
        store.put(here)  # nothing to do if it is there
    return here


def _store(spec: JobSpec) -> ObjectStore:
    from workers.object_store import ObjectStore

    return ObjectStore(spec.checkpoint_url)
