"""One contract, two registries: whatever holds for MLflow holds for the one in memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.contracts import MetricPoint, NoSuchVersion, RegistryConflict
from tests.contract.memory_registry import MemoryRegistry
from tests.contract.samples import (
    classification,
    fresh_name,
    home_of,
    killed_in_its_move,
    new_version,
    recommendation,
)
from workers.manifest import CorruptFolder, folder_digest, verify_folder
from workers.types import BadInput


@pytest.fixture(params=["memory", "mlflow", "mlflow-postgresql"])
def registry(request, tmp_path):
    if request.param == "memory":
        return MemoryRegistry(tmp_path / "store")
    from orchestrator.registry.registry import MlflowRegistry

    name = "server_on_postgres" if request.param == "mlflow-postgresql" else "server_on_sqlite"
    return MlflowRegistry(request.getfixturevalue(name).url)


@pytest.fixture
def name():
    return fresh_name()


@pytest.fixture
def two_versions(registry, tmp_path, name):
    return [registry.register(new_version(registry, tmp_path, name, f"step-{i}", seed=i)) for i in (1, 2)]


def stored_weights(registry, version) -> Path:
    """The file that holds the version's weights, found as somebody with access to the disk would."""
    store = registry.store if isinstance(registry, MemoryRegistry) else home_of(registry) / "mlflow"
    return next(path for path in store.rglob("adapter_model.safetensors") if version.model_id in str(path))


def alter(registry, version):
    path = stored_weights(registry, version)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


# ---- runs ----


def test_start_run_same_key_twice_returns_one_run(registry, name):
    first = registry.start_run(name, "contract", "job", {"r": "8"}, {"task": "chat"})
    again = registry.start_run(name, "contract", "job", {"r": "8", "lora_alpha": "16"}, {"task": "chat"})
    other = registry.start_run(f"{name}-2", "contract", "job", {}, {})
    assert first == again != other


def test_start_run_after_a_killed_run_goes_on_with_it(registry, name):
    run = registry.start_run(name, "contract", "job", {"r": "8"}, {})
    registry.end_run(run, "KILLED")
    assert registry.start_run(name, "contract", "job", {"r": "8"}, {}) == run
    registry.log_metrics(run, [MetricPoint("loss", 1.0, 1, 1_700_000_000_000)])
    registry.end_run(run, "FINISHED")


def test_run_takes_points_inputs_evaluation_and_text_twice(registry, name):
    run = registry.start_run(name, "contract", "job", {}, {})
    for _ in range(2):
        registry.log_metrics(
            run, [MetricPoint("loss", 2.0 / s, s, 1_700_000_000_000 + s) for s in range(1, 5)]
        )
        registry.log_inputs(run, {"training": ("data/train.jsonl", "a" * 64)})
        registry.log_evaluation(run, [classification()], "base")
        registry.log_text(run, "recipe.yaml", "task: chat\n")


# ---- versions ----


def test_register_new_step_gives_version_with_digest_tags_and_metrics(registry, tmp_path, name):
    scores, base = [classification(), recommendation()], [classification(macro_f1=0.3)]
    new = new_version(registry, tmp_path, name, scores=scores, base_scores=base)
    version = registry.register(new)
    assert (version.name, version.version, version.run_id) == (name, 1, new.run_id)
    assert version.digest == folder_digest(new.adapter_dir)
    assert version.tags["base.digest"] == "b" * 64
    assert version.tags["gate.status"] == "pending"
    assert version.metrics["sentiment/macro_f1"] == 0.9
    assert version.metrics["recommendation/hit_at_1"] == 0.5
    assert version.metrics["base/sentiment/macro_f1"] == 0.3
    assert version.created_ms > 0


def test_register_same_step_twice_returns_first_version(registry, tmp_path, name):
    new = new_version(registry, tmp_path, name)
    assert registry.register(new) == registry.register(new)
    assert [version.version for version in registry.versions(name)] == [1]


def test_register_damaged_adapter_is_refused_and_absent(registry, tmp_path, name):
    new = new_version(registry, tmp_path, name)
    (new.adapter_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptFolder, match=r"adapter_config\.json"):
        registry.register(new)
    assert list(registry.versions(name)) == []


def test_register_fused_adapter_names_its_parents(registry, tmp_path, name, two_versions):
    parents = [f"{name}/1", f"{name}/2"]
    changes = {"parents": parents, "model_type": "lora-adapter-fused", "fusion_report": {"rule": "svd"}}
    fused = registry.register(
        new_version(registry, tmp_path, fresh_name("fused"), "step-f", seed=9, **changes)
    )
    assert fused.tags["fusion.parents"].split(",") == parents


def test_versions_all_names_holds_every_version_in_order(registry, name, two_versions):
    assert [(v.name, v.version) for v in registry.versions(name)] == [(name, 1), (name, 2)]
    assert two_versions == [v for v in registry.versions() if v.name == name]


@pytest.mark.parametrize("ref", ["7", "champion", "no such alias"])
def test_version_unknown_reference_raises(registry, name, two_versions, ref):
    with pytest.raises(NoSuchVersion):
        registry.version(name, ref)


def test_version_unknown_name_raises(registry):
    with pytest.raises(NoSuchVersion):
        registry.version("no-such-name", "1")


def test_read_text_returns_card_and_refuses_unknown_file(registry, name, two_versions):
    assert registry.read_text(two_versions[0], "README.md") == "# card\n"
    with pytest.raises(NoSuchVersion, match=r"nothing\.txt"):
        registry.read_text(two_versions[0], "nothing.txt")


def test_set_tags_changes_gate_status_but_never_a_digest(registry, name, two_versions):
    registry.set_tags(name, 1, {"gate.status": "failed"})
    assert registry.version(name, "1").tags["gate.status"] == "failed"
    with pytest.raises(BadInput, match=r"adapter\.digest"):
        registry.set_tags(name, 1, {"adapter.digest": "0" * 64})


# ---- bytes ----


def test_download_gives_the_adapter_folder_again(registry, tmp_path, two_versions):
    folder = registry.download(two_versions[1], tmp_path / "out" / "adapter")
    verify_folder(folder)
    assert folder_digest(folder) == two_versions[1].digest
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert registry.download(two_versions[1], folder) == folder


def test_download_onto_another_version_is_refused(registry, tmp_path, two_versions):
    folder = registry.download(two_versions[0], tmp_path / "adapter")
    with pytest.raises(RegistryConflict, match="exists"):
        registry.download(two_versions[1], folder)
    assert folder_digest(folder) == two_versions[0].digest


@pytest.mark.parametrize("faster", [0, 1])
def test_download_that_another_was_faster_with_is_checked(
    registry, tmp_path, two_versions, monkeypatch, faster
):
    """Two commands fetch into one folder: here the other publishes while this one is still writing."""
    to, copy = tmp_path / "adapter", shutil.copyfile

    def late(source, target, **named):
        if not to.exists():
            monkeypatch.setattr(shutil, "copyfile", copy)
            registry.download(two_versions[faster], to)
        return copy(source, target, **named)

    monkeypatch.setattr(shutil, "copyfile", late)
    if faster == 0:
        assert registry.download(two_versions[0], to) == to
    else:
        with pytest.raises(RegistryConflict, match="exists"):
            registry.download(two_versions[0], to)
    assert folder_digest(to) == two_versions[faster].digest
    assert [path.name for path in tmp_path.glob(".adapter.*")] == []


def test_download_altered_adapter_is_found_out(registry, tmp_path, two_versions):
    alter(registry, two_versions[0])
    with pytest.raises(RegistryConflict, match="altered"):
        registry.download(two_versions[0], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_promote_altered_adapter_is_refused_and_moves_nothing(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    alter(registry, two_versions[1])
    with pytest.raises(RegistryConflict, match="altered"):
        registry.promote(name, 2, 1, "better", {})
    assert registry.version(name, "champion").version == 1


# ---- aliases ----


def test_set_alias_moves_candidate(registry, name, two_versions):
    registry.set_alias(name, "candidate", 1)
    registry.set_alias(name, "candidate", 2)
    assert registry.version(name, "candidate").version == 2
    assert registry.version(name, "1").aliases == ()


@pytest.mark.parametrize("alias", ["champion", "previous"])
def test_set_alias_of_a_recorded_move_is_refused(registry, name, two_versions, alias):
    with pytest.raises(BadInput, match=alias):
        registry.set_alias(name, alias, 1)


def test_set_alias_to_unknown_version_raises(registry, name, two_versions):
    with pytest.raises(NoSuchVersion):
        registry.set_alias(name, "candidate", 9)


def test_promote_twice_keeps_previous(registry, name, two_versions):
    assert registry.promote(name, 1, None, "first", {"macro_f1": 0.9}).aliases == ("champion",)
    second = registry.promote(name, 2, 1, "better", {"macro_f1": 0.95})
    assert (second.version, second.aliases, second.tags["gate.status"]) == (2, ("champion",), "passed")
    assert registry.version(name, "previous").version == 1


def test_promote_with_wrong_expectation_conflicts_and_moves_nothing(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    for wrong in (None, 2):
        with pytest.raises(RegistryConflict, match="champion"):
            registry.promote(name, 2, wrong, "late", {})
    assert registry.version(name, "champion").version == 1
    with pytest.raises(NoSuchVersion):
        registry.version(name, "previous")


def test_promote_asked_again_changes_nothing(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    assert registry.promote(name, 2, 1, "better", {}).version == 2
    assert registry.version(name, "previous").version == 1


def test_promote_of_the_champion_itself_keeps_previous_and_is_no_move(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    assert registry.promote(name, 2, 2, "as it is", {}).version == 2
    assert registry.version(name, "previous").version == 1
    assert len(registry.history(name)) == 2


def test_promote_of_what_another_rolled_back_to_meanwhile_is_told(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    registry.rollback(name, 2, "worse in use")
    with pytest.raises(RegistryConflict, match="champion"):
        registry.promote(name, 1, 2, "back to the first", {})
    assert len(registry.history(name)) == 3


def test_promote_unknown_version_raises(registry, name, two_versions):
    with pytest.raises(NoSuchVersion):
        registry.promote(name, 9, None, "nothing", {})


def test_rollback_swaps_champion_and_previous(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    assert registry.rollback(name, 2, "worse in use").version == 1
    assert registry.version(name, "previous").version == 2
    assert registry.rollback(name, 1, "was right after all").version == 2


def test_rollback_asked_again_or_by_two_at_once_swaps_once(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    assert registry.rollback(name, 2, "worse in use").version == 1
    assert registry.rollback(name, 2, "worse in use, says another").version == 1
    assert [record.reason for record in registry.history(name)] == ["first", "better", "worse in use"]


def test_rollback_with_wrong_expectation_conflicts_and_moves_nothing(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    for wrong in (None, 1):
        with pytest.raises(RegistryConflict, match="champion"):
            registry.rollback(name, wrong, "late")
    assert registry.version(name, "champion").version == 2
    assert len(registry.history(name)) == 2


def test_rollback_without_previous_raises(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    with pytest.raises(NoSuchVersion):
        registry.rollback(name, 1, "nothing to go back to")
    assert registry.version(name, "champion").version == 1


# ---- a move that was interrupted ----


def test_finish_move_of_a_name_that_never_moved_or_is_not_there_makes_nothing(registry, name, two_versions):
    assert list(registry.finish_move(name)) == []
    assert list(registry.finish_move("no-such-name")) == []
    assert registry.version(name, "2").aliases == ()


def test_finish_move_ends_an_interrupted_promotion_once(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    with killed_in_its_move(registry):
        registry.promote(name, 2, 1, "better", {})
    assert [record.done for record in registry.history(name)] == [True, False]
    assert registry.version(name, "2").aliases == ("champion",)
    assert list(registry.audit(name)) == [], "it is where its record says, be that ended or not"
    for _ in range(2):
        made = registry.finish_move(name)
        assert [(r.source, r.target, r.done) for r in made] == [(0, 1, True), (1, 2, True)]
        assert list(made) == list(registry.history(name))
    assert registry.version(name, "2").tags["gate.status"] == "passed"


def test_finish_move_ends_an_interrupted_rollback_and_does_not_swap_back(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    with killed_in_its_move(registry):
        registry.rollback(name, 2, "worse in use")
    assert [(r.kind, r.target) for r in registry.finish_move(name)][2:] == [("rollback", 1)]
    assert registry.version(name, "champion").version == 1
    assert registry.version(name, "previous").version == 2


# ---- the release record ----


def test_history_tells_who_moved_what_when_and_why(registry, name, two_versions):
    assert list(registry.history(name)) == []
    registry.promote(name, 1, None, "first", {"sentiment.macro_f1": 0.9})
    registry.promote(name, 2, 1, "better", {})
    registry.rollback(name, 2, "worse in use")
    found = registry.history(name)
    assert [(r.number, r.kind, r.source, r.target) for r in found] == [
        (1, "promote", 0, 1),
        (2, "promote", 1, 2),
        (3, "rollback", 2, 1),
    ]
    assert [r.reason for r in found] == ["first", "better", "worse in use"]
    assert found[0].figures == {"sentiment.macro_f1": 0.9}
    assert found[1].digests["adapter.digest"] == two_versions[1].digest
    assert found[1].digests["base.digest"] == "b" * 64
    assert all(r.done and r.who and r.when_ms for r in found)


def test_conditions_of_a_name_are_kept_and_replaced(registry, name, two_versions):
    assert dict(registry.conditions(name)) == {}
    registry.set_conditions(name, {"gates": {"sentiment.macro_f1": ">= 0.9"}})
    registry.set_conditions(name, {"worst_task": ">= 0.5"})
    assert dict(registry.conditions(name)) == {"worst_task": ">= 0.5"}
    with pytest.raises(NoSuchVersion):
        registry.set_conditions("no-such-name", {})


def test_scores_of_rows_are_read_back_as_they_were_registered(registry, tmp_path, name):
    from orchestrator.registry.evaluations import read_scores

    rows = {"truth": (0.0, 1.0, 2.0), "predicted": (0.0, 1.0, 1.0)}
    score = classification()
    score = replace(score, report=replace(score.report, row_scores=rows, predictions=()))
    version = registry.register(new_version(registry, tmp_path, name, scores=[score], base_scores=[score]))
    assert read_scores(registry, version) == (score,)
    assert read_scores(registry, version, "base_scores") == (score,)


# ---- the audit ----


def test_audit_of_an_untouched_name_finds_nothing(registry, name, two_versions):
    registry.promote(name, 1, None, "first", {})
    assert list(registry.audit(name)) == []


def test_audit_names_the_version_whose_bytes_were_altered(registry, name, two_versions):
    alter(registry, two_versions[1])
    (problem,) = registry.audit(name)
    assert (problem.name, problem.version) == (name, 2)
    assert "altered" in problem.words
