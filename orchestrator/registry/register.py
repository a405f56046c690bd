"""Registering an adapter version in MLflow: whole or not at all, however often it is interrupted.

Owns the artifacts of a version. MLflow would publish a version whose files are missing, so the order here is:
upload, read back, compare, and only then the version, which MLflow creates with its tags in one transaction.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, NewVersion, Scores
from orchestrator.judgement import GATE_TAG
from orchestrator.registry import answers, evaluations, plots
from orchestrator.registry.artifacts import check_upload, stored_manifest
from orchestrator.registry.client import PAGE, exists_already, metric_key, pages, quoted
from orchestrator.registry.fusion_plots import fusion_plots
from orchestrator.registry.runs import dataset
from orchestrator.registry.versions import (
    ADAPTER_TAG,
    LINK_TAG,
    MANIFEST_TAG,
    PARENTS_TAG,
    STEP_TAG,
    aliases_of,
    get_version,
    model_id_of,
    read_version,
)
from workers.manifest import (
    MANIFEST,
    file_digest,
    folder_digest,
    folder_files,
    publish_folder,
    read_manifest,
    verify_folder,
)
from workers.types import BadInput


def register(client: MlflowClient, new: NewVersion) -> AdapterVersion:
    """The version of `new.step_id`: found, taken up where a killed call left it, or made."""
    found = _version_of_step(client, new)
    if found is None:
        with tempfile.TemporaryDirectory() as scratch:
            staged = stage(new, Path(scratch) / "version")
            model_id = _ready_model(client, new, staged)
            _create_version(client, new, staged, model_id)
        found = _version_of_step(client, new)
        assert found is not None, f"{new.name}: the version just created is not found"
    _link(client, found, new)
    return read_version(client, found, aliases_of(client, new.name))


def stage(new: NewVersion, folder: Path) -> Path:
    """All files of a version with one manifest over them, as they will lie in the registry.

    Raises CorruptFolder if the adapter does not match its own manifest, BadInput if it brings a file of
    our name.
    """
    if (new.adapter_dir / MANIFEST).exists():
        verify_folder(new.adapter_dir)
    adapter_files = folder_files(new.adapter_dir)
    about = {
        "adapter_digest": folder_digest(new.adapter_dir),
        "adapter_files": sorted(adapter_files),
        "step_id": new.step_id,
        "parents": list(new.parents),
        "tags": dict(sorted(new.tags.items())),
    }
    with publish_folder(folder, about) as scratch:
        for name in adapter_files:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new.adapter_dir / name, scratch / name)
        for name, text in _documents(new).items():
            if name in adapter_files:
                raise BadInput(f"{new.adapter_dir / name}: the registry writes this file itself; remove it")
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text)
        for score, base in _beside_base(new):
            pictures = scratch / "eval" / score.task
            pictures.mkdir(parents=True, exist_ok=True)
            plots.evaluation_plots(score, base, pictures)
        if new.fusion_report is not None:
            fusion_plots(new.fusion_report, scratch / "fusion")
    return folder


def _documents(new: NewVersion) -> dict[str, str]:
    documents = {
        "README.md": new.card,
        "recipe.yaml": new.recipe_yaml,
        **evaluations.documents(new.scores, new.base_scores, new.controls),
        **answers.documents(new.tags, new.tasks),
    }
    if new.fusion_report is not None:
        documents["fusion/report.json"] = json.dumps(new.fusion_report, indent=2) + "\n"
    return documents


def _beside_base(new: NewVersion) -> list[tuple[Scores, Scores | None]]:
    base = {score.task: score for score in new.base_scores}
    return [(score, base.get(score.task)) for score in new.scores]


def _ready_model(client: MlflowClient, new: NewVersion, staged: Path) -> str:
    """A LoggedModel that holds exactly the staged files; what a killed call left unfinished is deleted."""
    for model in _models_of_step(client, new):
        if model.status == "READY" and stored_manifest(client, model.model_id) == file_digest(
            staged / MANIFEST
        ):
            return str(model.model_id)
        client.delete_logged_model(model.model_id)
    return _upload_model(client, new, staged)


def _upload_model(client: MlflowClient, new: NewVersion, staged: Path) -> str:
    run = client.get_run(new.run_id).info
    model = client.create_logged_model(
        experiment_id=run.experiment_id,
        name=_model_name(new),
        source_run_id=new.run_id,
        tags=version_tags(new, staged),
        params={key: str(value) for key, value in new.params.items()},
        model_type=new.model_type,
    )
    model_id = str(model.model_id)
    _log_scores(client, new, model_id, int(run.start_time or 0))
    client.log_model_artifacts(model_id, str(staged))
    check_upload(client, model_id, file_digest(staged / MANIFEST))
    client.finalize_logged_model(model_id, "READY")
    return model_id


def version_tags(new: NewVersion, staged: Path) -> dict[str, str]:
    """The caller's tags and those that bind the version to its step and its bytes."""
    tags = {GATE_TAG: "pending", **new.tags, STEP_TAG: new.step_id}
    tags[ADAPTER_TAG] = read_manifest(staged)["adapter_digest"]
    tags[MANIFEST_TAG] = file_digest(staged / MANIFEST)
    if new.parents:
        tags[PARENTS_TAG] = ",".join(new.parents)
    return {key: str(value) for key, value in tags.items()}


def _log_scores(client: MlflowClient, new: NewVersion, model_id: str, when: int) -> None:
    """Metrics bound to model, run and data set: the adapter's, and the base's under `base/`.

    `when` is the run's start, in ms, so that a second upload adds no second point to the run.
    """
    rows = [("", score) for score in new.scores] + [("base", score) for score in new.base_scores]
    for prefix, score in rows:
        data = dataset(score.dataset, score.dataset_digest)
        metrics = [
            Metric(
                metric_key(prefix, score.task, key),
                value,
                when,
                0,
                model_id=model_id,
                dataset_name=data.name,
                dataset_digest=data.digest,
                run_id=new.run_id,
            )
            for key, value in score.report.metrics.items()
        ]
        client.log_batch(new.run_id, metrics=metrics)


def _create_version(client: MlflowClient, new: NewVersion, staged: Path, model_id: str) -> None:
    try:
        client.create_registered_model(new.name)
    except MlflowException as error:
        if not exists_already(error):
            raise
    client.create_model_version(
        new.name,
        source=f"models:/{model_id}",
        run_id=new.run_id,
        tags=version_tags(new, staged),
        await_creation_for=0,
        model_id=model_id,
    )


def _link(client: MlflowClient, version: ModelVersion, new: NewVersion) -> None:
    """Links between run, LoggedModel and version, which MLflow's pages follow."""
    model_id = model_id_of(version)
    link = [{"name": version.name, "version": int(version.version)}]
    client.set_logged_model_tags(model_id, {LINK_TAG: json.dumps(link)})
    # MLflow refuses the same link twice, so only the absent ones are written.
    run = client.get_run(new.run_id)
    linked = {model.model_id for model in (run.outputs.model_outputs if run.outputs else [])}
    if model_id not in linked:
        client.log_outputs(new.run_id, [LoggedModelOutput(model_id, step=0)])
    used = {model.model_id for model in (run.inputs.model_inputs if run.inputs else [])}
    parents = [_parent_model(client, parent) for parent in new.parents]
    missing = [LoggedModelInput(parent) for parent in parents if parent not in used]
    if missing:
        client.log_inputs(new.run_id, models=missing)


def _parent_model(client: MlflowClient, parent: str) -> str:
    name, _, number = parent.rpartition("/")
    return model_id_of(get_version(client, name, number))


def _version_of_step(client: MlflowClient, new: NewVersion) -> ModelVersion | None:
    """The first version of the step. Others are deleted: MLflow's client repeats unanswered requests."""
    wanted = f"name = {quoted(new.name)} AND tags.`{STEP_TAG}` = {quoted(new.step_id)}"
    found = list(pages(client.search_model_versions, filter_string=wanted, max_results=PAGE))
    first, *more = sorted(found, key=lambda version: int(version.version)) or [None]
    for version in more:
        assert version is not None
        client.delete_model_version(new.name, str(version.version))
    return first


def _models_of_step(client: MlflowClient, new: NewVersion) -> list[LoggedModel]:
    experiment = client.get_run(new.run_id).info.experiment_id
    wanted = f"tags.`{STEP_TAG}` = {quoted(new.step_id)}"
    found = pages(client.search_logged_models, experiment_ids=[experiment], filter_string=wanted)
    return [model for model in found if model.name == _model_name(new)]


def _model_name(new: NewVersion) -> str:
    """A LoggedModel's name may hold no dot, slash or colon."""
    return re.sub(r"[^\w\-]", "-", new.name)
