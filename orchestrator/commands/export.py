"""`fuse` and `release`: registered adapters to a folder, through the same tasks that a run uses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from orchestrator.api import errors
from orchestrator.commands.adapters import GATE_TAG, find
from orchestrator.commands.parts import ClusterChoice, Parts
from orchestrator.contracts import AdapterVersion, Cluster, Registry
from orchestrator.control.submission import read_order
from orchestrator.disk import room
from orchestrator.home import Home
from orchestrator.recipe.base_file import anchor, load_base
from orchestrator.recipe.file import Place
from workers.manifest import CorruptFolder, verify_folder
from workers.rules import options_of
from workers.types import BadInput, BaseSpec, ExportTask, FuseTask, Task

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class FuseOptions:
    adapters: tuple[str, ...]
    """NAME@REF, NAME/NUMBER, or a folder in PEFT layout."""
    weights: tuple[float, ...]
    rule: str
    rank: int | None
    out: Path
    settings: tuple[str, ...] = ()
    """Of the rule, each KEY=FIGURE."""


def fuse(parts: Parts, home: Home, options: FuseOptions, console: Console) -> None:
    """Fuse adapters into a folder in PEFT layout. Raises BadInput, NoSuchVersion, TaskFailed."""
    _refuse_existing(options.out)
    folders = _adapter_folders(parts, home, options.adapters)
    task = FuseTask(
        adapter_dirs=tuple(str(folder) for folder in folders),
        weights=options.weights or (1.0,) * len(folders),
        rule=options.rule,
        rank=options.rank,
        options=options_of(options.settings),
        out_dir=str(options.out.absolute()),
    )
    with parts.cluster(home, ClusterChoice(local=True)) as cluster:
        report = _carry_out(cluster, task)
    summary = report["summary"]
    console.print(f"fused {len(folders)} adapters by {options.rule} into {options.out}", soft_wrap=True)
    console.print(
        f"discarded energy {summary['discarded_energy']:.4g} of the whole; of each module: "
        f"{options.out / 'fusion.json'}",
        soft_wrap=True,
    )
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _adapter_folders(parts: Parts, home: Home, references: Sequence[str]) -> list[Path]:
    local = [reference for reference in references if Path(reference).is_dir()]
    if len(local) == len(references):
        return [Path(reference).absolute() for reference in references]
    with parts.registry(home) as registry:
        versions = {ref: find(registry, ref) for ref in references if ref not in local}
        _check_one_base(versions)
        folders = {ref: _downloaded(registry, home, version) for ref, version in versions.items()}
    return [folders.get(reference, Path(reference).absolute()) for reference in references]


def _check_one_base(versions: dict[str, AdapterVersion]) -> None:
    first, *others = versions
    for other in others:
        if versions[other].tags.get("base.digest") != versions[first].tags.get("base.digest"):
            raise BadInput(
                f"{other} was trained on another base than {first}; only adapters of one base can be fused"
            )


@dataclass(frozen=True)
class ReleaseOptions:
    adapter: str
    out: Path
    merged: bool
    base: str | None
    """Base file or model folder, when the base is not where it was at training."""
    repair: bool = False
    """Write the adapter as every server reads it."""
    key: Path | None = None
    """Private key in PEM to sign the folder with."""


def release(parts: Parts, home: Home, options: ReleaseOptions, console: Console) -> None:
    """Write a version that passed its gates to a folder, with card, recipe and manifest.

    Raises BadInput for a folder that exists or a base that is not the version's, Refused for a version that
    did not pass.
    """
    _refuse_existing(options.out)
    if options.merged and options.repair:
        raise BadInput("a merged model has no adapter to repair; leave out either --merged or --repair")
    if options.key is not None and not options.key.is_file():
        raise BadInput(f"{options.key} is no file; give the private key to sign with, in PEM")
    with parts.registry(home) as registry:
        version = find(registry, options.adapter)
        label = f"{version.name}/{version.version}"
        if version.tags.get(GATE_TAG) != "passed":
            raise errors.Refused(f"{label} has not passed its gates; `chorus promote` says what it lacks")
        base = _base_of(parts, home, version, options.base)
        files = tuple((name, registry.read_text(version, name)) for name in ("README.md", "recipe.yaml"))
        adapter = _downloaded(registry, home, version)
    task = ExportTask(
        *(str(adapter), base.path, options.merged, str(options.out.absolute()), files, base.dtype),
        name=label,
        base_digest=version.tags["base.digest"],
        repair=options.repair,
        signing_key=None if options.key is None else str(options.key.absolute()),
    )
    with parts.cluster(home, ClusterChoice(local=True)) as cluster:
        made = _carry_out(cluster, task)
    kind = "merged model" if options.merged else "adapter"
    console.print(f"{label}: {kind} in {options.out}", soft_wrap=True)
    if made.get("lost"):
        words = (
            f"its rank was above vLLM's: the nearest adapter of a lower one, {made['lost']:.2%} of it lost"
        )
        console.print(words, soft_wrap=True)
    _say_how_to_serve(made, options, console)


def _say_how_to_serve(made: Mapping[str, Any], options: ReleaseOptions, console: Console) -> None:
    found = made.get("obstacles", ())
    for obstacle in found:
        words = f"{obstacle['server']} would not serve it as it was scored: {obstacle['words']}"
        console.print(words, soft_wrap=True)
    if any(obstacle["repairable"] for obstacle in found):
        console.print("`chorus release --repair` writes it as every server reads it", soft_wrap=True)
    for server, command in made.get("commands", {}).items():
        if server not in {obstacle["server"] for obstacle in found}:
            console.print(f"{server}, in {options.out}: {command}", soft_wrap=True)


def verify(folder: Path, key: Path | None, console: Console) -> None:
    """Check a released folder's bytes, and with a public key its signature.

    Raises Refused naming the first file that was altered, BadInput for what is no folder or no key.
    """
    from workers.signature import check_signature

    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; give a folder that `chorus release` wrote")
    if key is not None and not key.is_file():
        raise BadInput(f"{key} is no file; give the public key, in PEM")
    try:
        files = verify_folder(folder)["files"]
        if key is not None:
            check_signature(folder.absolute(), key.absolute())
    except CorruptFolder as error:
        raise errors.Refused(str(error)) from error
    signed = "" if key is None else f", and signed by the owner of {key}"
    console.print(f"{folder}: {len(files)} files as they were released{signed}", soft_wrap=True)


def _base_of(parts: Parts, home: Home, version: AdapterVersion, named: str | None) -> BaseSpec:
    """The base, found where the user says or where a job of this home had it, and checked by its digest."""
    digest = version.tags.get("base.digest", "")
    spec = None if named else _known_base(parts, home, digest)
    if named is None and spec is None:
        raise BadInput(
            f"no job of {home.folder} trained on the base of {version.name}; name it with --base FOLDER"
        )
    reference = anchor(named, Path.cwd()) if named else spec.path if spec else ""
    found = load_base(reference, Place(Path(reference), 1))
    if found.digests.all != digest:
        raise BadInput(
            f"{reference} is not the base {version.name}/{version.version} was trained on; its digest differs"
        )
    return spec or found.spec


def _known_base(parts: Parts, home: Home, digest: str) -> BaseSpec | None:
    if not home.has_store:
        return None
    with parts.store(home) as store:
        specs = [read_order(job.plan).job.base for job in store.jobs()]
    return next((spec for spec in reversed(specs) if spec.digest == digest), None)


# ---- shared ---------------------------------------------------------------------------------------------


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise BadInput(f"{out} exists already; name a folder that does not, nothing is ever overwritten")


def _downloaded(registry: Registry, home: Home, version: AdapterVersion) -> Path:
    """The adapter's folder, verified, kept by its digest."""
    return registry.download(version, (home.downloads / version.digest).absolute())


def _carry_out(cluster: Cluster, task: Task) -> dict[str, Any]:
    """Run a task to its end. Raises BadInput, DiskFull, TaskFailed."""
    key = uuid4().hex
    cluster.submit_task(key, task)
    while (result := cluster.task_result(key)) is None:
        time.sleep(POLL_SECONDS)
    if result.error is None:
        return result.value
    if result.disk_full:
        where = room(Path(task.out_dir))
        raise errors.DiskFull(
            f"the disk takes no more: {where}; free some space and run the same command again"
        )
    raise BadInput(result.error) if result.refused else errors.TaskFailed(result.error)
