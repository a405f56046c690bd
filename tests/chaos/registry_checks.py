"""What must hold of a registry after `tests.chaos.registry`: versions, their bytes, champions, the record.

Counts, so that a record of the case shows them; 0 is right everywhere. Reads MLflow and the children's files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, NoSuchVersion, Registry, ReleaseRecord
from orchestrator.registry.client import pages
from tests.chaos.registry_children import MADE, PROMOTERS, TOLD, WRITERS, told
from workers.manifest import MANIFEST, CorruptFolder, file_digest, verify_folder

STEP, MANIFEST_TAG = "chorus.step_id", "manifest.digest"


# ---- versions -------------------------------------------------------------------------------------------


def of_versions(
    registry: Registry, client: MlflowClient, home: Path, folder: Path, wanted: set[tuple[str, str]]
) -> dict[str, list[str]]:
    """`wanted`: name and step of every version that was to be made."""
    versions = {(v.name, v.version): v for v in registry.versions()}
    made = Counter((v.name, v.tags[STEP]) for v in versions.values())
    acknowledged = list(told(folder, WRITERS))
    models = list(_models(client))
    return {
        "versions lost": [f"{key}" for key in sorted(wanted - set(made))],
        "versions doubled": [f"{key}" for key, times in made.items() if times > 1],
        "versions nobody asked for": [f"{key}" for key in sorted(set(made) - wanted)],
        "versions that are not what its writer was told": list(_not_as_told(versions, acknowledged)),
        "half versions: files that are not what was registered": list(
            _half(versions.values(), home / "mlflow" / "artifacts")
        ),
        "models left unfinished, or doubled": list(_unfinished(models)),
        "problems that `adapters verify` names": [
            f"{p.name}/{p.version}: {p.words}" for p in registry.audit()
        ],
    }


def _not_as_told(
    versions: dict[tuple[str, int], AdapterVersion], acknowledged: Sequence[dict[str, Any]]
) -> Iterator[str]:
    for line in acknowledged:
        found = versions.get((line["name"], line["version"]))
        if found is None or (found.tags[STEP], found.digest) != (line["step"], line["digest"]):
            yield f"{line['name']}/{line['version']} of step {line['step']}"


def _half(versions: Any, artifacts: Path) -> Iterator[str]:
    """By the disk of the server, past all of its and our code but the digests."""
    folders = {path.parents[1].name: path.parent for path in artifacts.rglob(MANIFEST)}
    for version in versions:
        stored = folders.get(version.model_id)
        try:
            if stored is None or file_digest(stored / MANIFEST) != version.tags[MANIFEST_TAG]:
                raise CorruptFolder("its manifest is gone, or another")
            verify_folder(stored)
        except (CorruptFolder, OSError) as error:
            yield f"{version.name}/{version.version}: {error}"


def _models(client: MlflowClient) -> Iterator[Any]:
    untyped: Any = client
    experiments = [e.experiment_id for e in pages(untyped.search_experiments)]
    for experiment in experiments:
        yield from pages(client.search_logged_models, experiment_ids=[experiment])


def _unfinished(models: Sequence[Any]) -> Iterator[str]:
    """Those of a killed upload are deleted when it is taken up; each step keeps one that is whole."""
    yield from (f"{m.model_id} is {m.status}" for m in models if str(m.status) != "READY")
    steps = Counter((model.name, model.tags.get(STEP)) for model in models)
    yield from (f"{key} has {times} models" for key, times in steps.items() if times > 1)


# ---- moves ----------------------------------------------------------------------------------------------


def of_moves(
    registry: Registry, client: MlflowClient, folder: Path, names: Sequence[str]
) -> dict[str, list[str]]:
    moves = {name: list(registry.history(name)) for name in names}
    tried = list(told(folder, PROMOTERS))
    return {
        "moves that do not begin where the one before ended": [
            text for records in moves.values() for text in _broken(records)
        ],
        "aliases that are not where the record says": [
            text for name in names for text in _aliases(registry, name, moves[name])
        ],
        "records left unfinished, or without figures and digests": [
            *(f"{r.name} {r.number}" for records in moves.values() for r in records if not _complete(r)),
            *_runs_left(client),
        ],
        "moves made that have no record, or two": list(_unrecorded(tried, moves)),
        "moves recorded of which the promoter was told they were not made": list(
            _recorded_but_refused(tried, moves)
        ),
    }


def _broken(records: Sequence[ReleaseRecord]) -> Iterator[str]:
    champion = previous = 0
    for place, record in enumerate(records, 1):
        wrong = record.number != place or record.source != champion
        wrong |= record.kind == "rollback" and record.target != previous
        if wrong:
            yield (
                f"{record.name} {record.number}: {record.kind} {record.source} to {record.target}, "
                f"but {champion} was champion and {previous} previous"
            )
        champion, previous = record.target, record.source


def _aliases(registry: Registry, name: str, records: Sequence[ReleaseRecord]) -> Iterator[str]:
    last = records[-1] if records else None
    for alias, wanted in (
        ("champion", last.target if last else None),
        ("previous", (last.source if last else None) or None),
    ):
        try:
            found = registry.version(name, alias).version
        except NoSuchVersion:
            found = None
        if found != wanted:
            yield f"{alias} of {name} is {found}, the record says {wanted}"


def _complete(record: ReleaseRecord) -> bool:
    whole = record.done and record.who and record.when_ms and record.digests.get("adapter.digest")
    return bool(whole) and (record.kind == "rollback" or bool(record.figures))


def _runs_left(client: MlflowClient) -> Iterator[str]:
    """Runs of the record that never ended; a move that was not made ends as failed and says why."""
    experiment = client.get_experiment_by_name("releases")
    if experiment is None:
        return
    for run in pages(
        client.search_runs, experiment_ids=[experiment.experiment_id], run_view_type=ViewType.ALL
    ):
        withdrawn = run.info.status == "FAILED" and "release.lost" in run.data.tags
        if run.info.status != "FINISHED" and not withdrawn:
            yield f"{run.info.run_name} is {run.info.status}"


def _unrecorded(tried: Sequence[dict[str, Any]], moves: dict[str, list[ReleaseRecord]]) -> Iterator[str]:
    """A rollback from the same champion that the other was faster with counts for both."""
    recorded = Counter(record.reason for records in moves.values() for record in records)
    yield from (f"{reason} has {times} records" for reason, times in recorded.items() if times > 1)
    for line in tried:
        found = recorded[line["reason"]] or any(_same(line, record) for record in moves[line["name"]])
        if line["outcome"] == MADE and not found:
            yield f"{line['reason']}: {line}"


def _same(line: dict[str, Any], record: ReleaseRecord) -> bool:
    return line["kind"] == record.kind == "rollback" and line["champion"] == record.source


def _recorded_but_refused(
    tried: Sequence[dict[str, Any]], moves: dict[str, list[ReleaseRecord]]
) -> Iterator[str]:
    """Unless the server did not answer: the other may then have carried it out, and gone on from there."""
    recorded = {record.reason for records in moves.values() for record in records}
    for line in tried:
        if line["outcome"] == TOLD and line["reason"] in recorded and not line["unanswered"]:
            yield f"{line['reason']}: {line}"
