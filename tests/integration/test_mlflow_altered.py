"""What others do to our versions on the MLflow server is found out, and nothing altered is served."""

import threading
from contextlib import suppress

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.contracts import NoSuchVersion, RegistryConflict
from orchestrator.registry import releases
from orchestrator.registry.registry import MlflowRegistry
from tests.contract.samples import fresh_name, new_version, shared_server


@pytest.fixture
def registry():
    return MlflowRegistry(shared_server().url)


@pytest.fixture
def client(registry):
    return MlflowClient(registry.url, registry.url)


@pytest.fixture
def name(registry, tmp_path):
    """Two versions, the second champion after the first."""
    name = fresh_name()
    for seed in (1, 2):
        registry.register(new_version(registry, tmp_path, name, f"step-{seed}", seed))
    registry.promote(name, 1, None, "first", {})
    registry.promote(name, 2, 1, "better", {})
    return name


def words(registry, name):
    return [(problem.version, problem.words) for problem in registry.audit(name)]


def test_audit_finds_a_champion_that_was_deleted(registry, client, name):
    client.delete_model_version(name, "2")
    with pytest.raises(NoSuchVersion):
        registry.version(name, "champion")
    found = words(registry, name)
    assert {version for version, _ in found} == {2}
    assert any("champion is nothing" in text for _, text in found)
    assert any("has been deleted" in text for _, text in found)


def test_audit_finds_a_version_deleted_that_never_was_champion(registry, client, name, tmp_path):
    registry.register(new_version(registry, tmp_path, name, "step-3", 3))
    client.delete_model_version(name, "3")
    ((version, text),) = words(registry, name)
    assert version == 3
    assert "has been deleted; its files are still in the model m-" in text


def test_audit_finds_an_alias_moved_past_the_release_record(registry, client, name):
    client.set_registered_model_alias(name, "champion", "1")
    ((_, text),) = words(registry, name)
    assert "champion is version 1, but its release record says version 2" in text


@pytest.mark.parametrize("tag", ["base.digest", "task"])
def test_audit_finds_a_tag_that_was_changed_and_the_version_is_not_served(
    registry, client, name, tmp_path, tag
):
    client.set_model_version_tag(name, "2", tag, "0" * 64)
    with pytest.raises(RegistryConflict, match=f"its tag {tag} differs"):
        registry.download(registry.version(name, "2"), tmp_path / "out")
    assert [version for version, _ in words(registry, name)] == [2]


def test_audit_finds_a_version_that_lost_its_digest(registry, client, name):
    client.delete_model_version_tag(name, "1", "adapter.digest")
    assert (1, "it lacks the tags adapter.digest that bind it to its bytes") in words(registry, name)
    with pytest.raises(NoSuchVersion, match="not registered by chorus"):
        registry.version(name, "1")


def test_audit_finds_a_model_that_was_deleted_under_its_version(registry, client, name, tmp_path):
    client.delete_logged_model(registry.version(name, "1").model_id)
    assert [version.version for version in registry.versions(name)] == [1, 2]
    assert any(version == 1 and "deleted" in text for version, text in words(registry, name))
    with pytest.raises(RegistryConflict, match="deleted"):
        registry.download(registry.version(name, "1"), tmp_path / "out")


def test_audit_finds_a_fusion_whose_parent_is_gone(registry, client, name, tmp_path):
    fused = fresh_name("fused")
    changes = {"parents": [f"{name}/1"], "model_type": "lora-adapter-fused", "fusion_report": {"rule": "cat"}}
    registry.register(new_version(registry, tmp_path, fused, "step-f", 9, **changes))
    assert words(registry, fused) == []
    client.delete_model_version(name, "1")
    assert words(registry, fused) == [(1, f"its parent {name}/1 is no longer in the registry")]


# ---- two writers that share no lock ---------------------------------------------------------------------


def test_two_promotions_at_once_from_two_machines_one_wins_and_the_other_is_told(registry, name, tmp_path):
    """Without a common lock file, as two homes on one server: both read the same champion, then move it."""
    for seed in (3, 4):
        registry.register(new_version(registry, tmp_path, name, f"step-{seed}", seed))
    outcomes, together = {}, threading.Barrier(2)

    def promote(version):
        mine = MlflowRegistry(registry.url)
        together.wait()
        try:
            mine.promote(name, version, 2, f"by {version}", {})
            outcomes[version] = "won"
        except RegistryConflict as error:
            outcomes[version] = str(error)

    threads = [threading.Thread(target=promote, args=(version,)) for version in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (version for version, outcome in outcomes.items() if outcome == "won")
    assert registry.version(name, "champion").version == winner
    assert registry.version(name, "previous").version == 2
    assert [(r.number, r.source, r.target) for r in registry.history(name)][-1] == (3, 2, winner)
    assert len(registry.history(name)) == 3


def test_move_that_comes_second_for_its_number_is_withdrawn_and_told(registry, client, name, tmp_path):
    """The moment that a race hits: both have written their move down, neither has won."""
    for seed in (3, 4):
        registry.register(new_version(registry, tmp_path, name, f"step-{seed}", seed))
    first, second = (
        releases.write(client, "promote", 3, 2, registry.version(name, version), "race", {})
        for version in "34"
    )
    assert releases.winner(client, name, second) == second
    assert releases.winner(client, name, first) is None
    assert releases.winner(client, name, second) == second
    with suppress(RegistryConflict):
        registry.promote(name, 1, 2, "a third", {})  # carries out the winner, withdraws the loser
    assert registry.version(name, "champion").version == 4
    assert [(r.target, r.done) for r in registry.history(name)] == [(1, True), (2, True), (4, True)]
    assert client.get_run(first.run_id).data.tags["release.lost"] == "another move took its number"


def test_interrupted_move_to_a_version_that_was_deleted_blocks_nobody(registry, client, name, tmp_path):
    registry.register(new_version(registry, tmp_path, name, "step-3", 3))
    releases.write(client, "promote", 3, 2, registry.version(name, "3"), "never finished", {})
    client.delete_model_version(name, "3")
    assert registry.promote(name, 1, 2, "back", {}).version == 1
    assert [r.target for r in registry.history(name)] == [1, 2, 1]
