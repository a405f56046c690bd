"""`adapters`, `promote`, `rollback`, `fuse`, `release`: what they show, what they move, what they refuse."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from orchestrator.contracts import NoSuchVersion, RegistryUnreachable, TaskResult
from orchestrator.home import Home
from orchestrator.recipe.base_file import load_base
from orchestrator.recipe.file import Place
from tests.contract.samples import killed_in_its_move
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from tests.orchestrator.recipe_files import write_base

pytestmark = pytest.mark.usefixtures("unsynced")

FINANCE, SUPPORT, FUSED = "tiny.finance-sentiment", "tiny.support", "tiny.multitask"


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


def champion(world, name):
    try:
        return world.registry.version(name, "champion").version
    except NoSuchVersion:
        return None


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A world with three champions; tests only read it."""
    world = CliWorld(tmp_path_factory.mktemp("done"))
    assert world.chorus("run", world.two_jobs()).exit_code == 0
    return world


# ---- showing --------------------------------------------------------------------------------------------


def test_list_of_an_empty_home_is_empty_and_makes_nothing(world):
    assert world.read("adapters", "list") == []
    assert not world.home.folder.exists()


def test_list_has_every_version_with_aliases_and_scores(done):
    found = {version["name"]: version for version in done.read("adapters", "list")}
    assert set(found) == {FINANCE, SUPPORT, FUSED}
    assert found[FUSED]["aliases"] == ["candidate", "champion"]
    assert found[FUSED]["metrics"]["support/perplexity"] == 5.0
    assert f"{SUPPORT}" in done.chorus("adapters", "list").stdout
    assert [version["name"] for version in done.read("adapters", "list", SUPPORT)] == [SUPPORT]


@pytest.mark.parametrize("reference", [f"{FUSED}@champion", f"{FUSED}@1", f"{FUSED}/1"])
def test_show_finds_a_version_however_it_is_named(done, reference):
    shown = done.read("adapters", "show", reference)
    assert (shown["name"], shown["version"]) == (FUSED, 1)
    assert shown["tags"]["fusion.parents"] == f"{FINANCE}/1,{SUPPORT}/1"


def test_show_sets_scores_beside_those_of_the_base(done):
    rows = [line.split() for line in done.chorus("adapters", "show", f"{SUPPORT}@1").stdout.splitlines()]
    assert ["support.perplexity", "20", "5"] in rows


def test_compare_marks_the_best_of_a_metric_where_lower_is_better(world):
    world.chorus("run", world.one_job())
    from tests.orchestrator import fakes

    better = {**fakes.METRICS, "classification": {"macro_f1": 0.95, "accuracy": 0.8, "loss": 0.1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "METRICS", better)
        world.chorus("run", world.one_job(seed=7))
    result = world.chorus("adapters", "compare", f"{FINANCE}/1", f"{FINANCE}/2")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["finance-sentiment.accuracy", "0.9*", "0.8"] in rows
    assert ["finance-sentiment.loss", "0.2", "0.1*"] in rows
    value = world.read("adapters", "compare", f"{FINANCE}/1", f"{FINANCE}/2")
    assert value["metrics"]["finance-sentiment.macro_f1"] == {f"{FINANCE}/1": 0.9, f"{FINANCE}/2": 0.95}


@pytest.mark.parametrize("command", [("adapters", "show"), ("release", "--out", "x"), ("fuse", "--out", "x")])
def test_version_that_is_not_there_is_not_found(done, command):
    assert_one_sentence(done.chorus(*command, f"{FUSED}@9"), 102, FUSED, "'9'")


@pytest.mark.parametrize("command", [("adapters", "show"), ("release", "--out", "x"), ("fuse", "--out", "x")])
def test_reference_that_names_no_version_is_refused(done, command):
    assert_one_sentence(done.chorus(*command, "assistant"), 2, "'assistant'", "NAME@champion")


def test_registry_that_does_not_answer_exits_with_4(world):
    world.refuse_registry = RegistryUnreachable("the MLflow server does not answer")
    assert_one_sentence(world.chorus("adapters", "show", f"{FUSED}@1"), 4, "does not answer")


# ---- moving ---------------------------------------------------------------------------------------------


def test_promote_of_a_version_that_meets_its_gates_makes_it_champion(world):
    gates = {"gates": {"macro_f1": ">= 0.8"}}
    world.chorus("run", world.one_job(evaluation=gates, registry={"promote": False}))
    assert champion(world, FINANCE) is None
    result = world.chorus("promote", FINANCE, "candidate")
    assert result.exit_code == 0
    assert champion(world, FINANCE) == 1
    assert world.registry.releases[-1].figures["finance-sentiment.macro_f1"] == 0.9
    assert "champion already" in world.chorus("promote", FINANCE, "1").stdout


def test_promote_of_a_version_that_misses_its_gate_says_by_how_much_and_moves_nothing(world):
    world.chorus("run", world.one_job(evaluation={"gates": {"macro_f1": ">= 0.97"}}))
    result = world.chorus("promote", FINANCE, "1")
    assert_one_sentence(result, 3, f"{FINANCE}/1", "required >= 0.97: short by 0.07")
    assert champion(world, FINANCE) is None


def test_promote_of_a_version_worse_than_the_champion_by_more_than_the_margin_is_refused(world):
    from tests.orchestrator import fakes

    margin = {"champion_margin": {"macro_f1": 0.02}}
    world.chorus("run", world.one_job(evaluation=margin))
    worse = {**fakes.METRICS, "classification": {"macro_f1": 0.5, "accuracy": 0.5, "loss": 1.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "METRICS", worse)
        world.chorus("run", world.one_job(seed=7, evaluation=margin))
    assert_one_sentence(world.chorus("promote", FINANCE, "2"), 3, "champion 0.9", "short by 0.38")
    assert champion(world, FINANCE) == 1


def test_promote_of_a_fusion_that_keeps_too_little_of_a_parent_is_refused(world):
    world.chorus("run", world.two_jobs(evaluation={"retention": {"support.perplexity": ">= 1.5"}}))
    assert_one_sentence(world.chorus("promote", FUSED, "1"), 3, "support.perplexity is 1", "short by 0.5")
    assert champion(world, FUSED) is None


def test_promote_of_a_fusion_counts_a_parent_only_as_scored_on_the_same_rows(world):
    keep = {"retention": {"support.perplexity": ">= 0.5"}}
    world.chorus("run", world.two_jobs(evaluation=keep, registry={"promote": False}, release=None))
    fused, parent = (world.registry.version(name, "1") for name in (FUSED, SUPPORT))

    def edit(version, **changes):
        texts = world.registry._texts[version.model_id]
        texts["eval/report.json"] = json.dumps({**json.loads(texts["eval/report.json"]), **changes})

    scores = json.loads(world.registry.read_text(parent, "eval/report.json"))["scores"]
    edit(fused, controls={})
    edit(parent, scores=[{**score, "dataset_sha256": "0" * 64} for score in scores])
    assert_one_sentence(world.chorus("promote", FUSED, "1"), 3, "but the parent has no support.perplexity")
    edit(parent, scores=scores)
    assert world.chorus("promote", FUSED, "1").exit_code == 0


def test_promote_of_a_version_without_its_recipe_is_refused(world):
    world.chorus("run", world.one_job(registry={"promote": False}))
    for texts in world.registry._texts.values():
        del texts["recipe.yaml"]
    assert_one_sentence(world.chorus("promote", FINANCE, "1"), 3, "holds no recipe")


def test_promote_looks_for_the_base_in_the_store_that_is_named(world):
    world.home = Home(world.home.folder, f"sqlite:///{world.folder}/elsewhere.db")
    world.chorus("run", world.one_job(evaluation={"structure": ["shapes"]}, registry={"promote": False}))
    result = world.chorus("promote", FINANCE, "1")
    assert result.exit_code == 0, result.stderr
    assert champion(world, FINANCE) == 1


def test_rollback_makes_the_previous_champion_champion_again(world):
    world.chorus("run", world.one_job())
    world.chorus("run", world.one_job(seed=7))
    assert champion(world, FINANCE) == 2
    assert world.chorus("rollback", FINANCE).exit_code == 0
    assert champion(world, FINANCE) == 1


def test_rollback_given_again_does_not_put_the_bad_champion_back(world):
    world.chorus("run", world.one_job())
    world.chorus("run", world.one_job(seed=7))
    for _ in range(2):
        result = world.chorus("rollback", FINANCE)
        assert f"{FINANCE}/1 is champion of {FINANCE} again" in result.stdout
    assert f"`chorus promote {FINANCE} 2 --home {world.home.folder}` undoes it" in result.stdout
    assert champion(world, FINANCE) == 1
    assert len(world.registry.releases) == 3
    assert world.chorus("promote", FINANCE, "2").exit_code == 0
    assert "/1 is champion" in world.chorus("rollback", FINANCE).stdout


def test_rollback_killed_in_its_move_and_given_again_ends_it(world):
    world.chorus("run", world.one_job())
    world.chorus("run", world.one_job(seed=7))
    with killed_in_its_move(world.registry):
        world.chorus("rollback", FINANCE)
    assert world.chorus("rollback", FINANCE).exit_code == 0
    assert champion(world, FINANCE) == 1
    assert [(r.source, r.target, r.done) for r in world.registry.releases][2:] == [(2, 1, True)]


def test_promote_killed_in_its_move_and_given_again_ends_it(world, tmp_path):
    world.chorus("run", world.one_job(registry={"promote": False}))
    with killed_in_its_move(world.registry):
        world.chorus("promote", FINANCE, "1")
    assert "champion already" in world.chorus("promote", FINANCE, "1").stdout
    assert [(r.target, r.done) for r in world.registry.releases] == [(1, True)]
    assert world.chorus("release", f"{FINANCE}@champion", "--out", tmp_path / "out").exit_code == 0


def test_rollback_that_finds_an_unfinished_promotion_of_another_moves_nothing_unseen(world):
    """It was asked for when 1 was champion: that is not what went wrong with 2."""
    world.chorus("run", world.one_job())
    world.chorus("run", world.one_job(seed=7, registry={"promote": False}))
    with killed_in_its_move(world.registry):
        world.chorus("promote", FINANCE, "2")
    world.registry._aliases[FINANCE] = {"champion": 1}  # it came no further than its record
    assert_one_sentence(world.chorus("rollback", FINANCE), 3, "the champion of", "2")
    assert champion(world, FINANCE) == 2
    assert "/1 is champion" in world.chorus("rollback", FINANCE).stdout


def test_rollback_without_a_previous_champion_is_not_found(done):
    assert_one_sentence(done.chorus("rollback", FUSED), 102, FUSED)


# ---- to a folder ----------------------------------------------------------------------------------------


def test_release_writes_card_and_recipe_beside_the_adapter(done, tmp_path):
    out = tmp_path / "release"
    result = done.chorus("release", f"{SUPPORT}@champion", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"# {SUPPORT}" in (out / "README.md").read_text()
    assert "task: support" in (out / "recipe.yaml").read_text()
    assert done.clusters[-1].asked("ExportTask")[0].merged is False


def test_release_into_a_folder_that_exists_is_refused_and_changes_nothing(done, tmp_path):
    (tmp_path / "note").write_text("mine")
    assert_one_sentence(done.chorus("release", f"{FUSED}@1", "--out", tmp_path), 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_release_merged_has_the_weights_checked_as_they_are_merged(done, tmp_path):
    result = done.chorus("release", f"{SUPPORT}@champion", "--out", tmp_path / "out", "--merged")
    assert result.exit_code == 0, result.stderr
    (task,) = done.clusters[-1].asked("ExportTask")
    base = load_base(task.base_path, Place(Path(task.base_path), 1))
    assert (task.base_digest, task.base_weights) == (base.digests.all, base.digests.weights)


def test_release_merged_and_repaired_is_refused_as_wrong_usage(done, tmp_path):
    both = ("--out", tmp_path / "out", "--merged", "--repair")
    assert_one_sentence(done.chorus("release", f"{FUSED}@1", *both), 2, "no adapter to repair")
    assert not (tmp_path / "out").exists()


def test_release_of_a_version_that_did_not_pass_is_refused(world, tmp_path):
    world.chorus("run", world.one_job(evaluation={"gates": {"macro_f1": ">= 0.97"}}))
    result = world.chorus("release", f"{FINANCE}@candidate", "--out", tmp_path / "out")
    assert_one_sentence(result, 3, f"{FINANCE}/1", "gates")
    assert not (tmp_path / "out").exists()


def test_release_on_another_base_is_refused(done, tmp_path):
    other = write_base(tmp_path / "other", seed=1)
    result = done.chorus("release", f"{FUSED}@1", "--out", tmp_path / "out", "--base", other)
    assert_one_sentence(result, 2, "is not the base")
    assert not (tmp_path / "out").exists()


def test_fuse_into_a_folder_that_exists_is_refused(done, tmp_path):
    assert_one_sentence(done.chorus("fuse", f"{FUSED}@1", "--out", tmp_path), 2, str(tmp_path))


def test_fuse_with_weights_that_are_no_figures_is_a_usage_error(done, tmp_path):
    result = done.chorus("fuse", f"{FUSED}@1", "--weights", "1,x", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "1,x" in result.stderr


def test_fuse_of_adapters_of_two_bases_is_refused(world, tmp_path):
    world.chorus("run", world.one_job())
    write_base(world.folder / "bases" / "other", seed=1)
    world.chorus("run", world.one_job(base_model="bases/other"))
    result = world.chorus("fuse", f"{FINANCE}/1", "other.finance-sentiment/1", "--out", tmp_path / "out")
    assert_one_sentence(result, 2, "another base")


@pytest.mark.parametrize("command", [("fuse", f"{FUSED}@1"), ("release", f"{FUSED}@champion")])
def test_folder_on_a_full_disk_is_told_by_its_place_and_room_and_not_begun(done, tmp_path, command):
    done.faults.task_result = TaskResult.of(OSError(errno.ENOSPC, "No space left on device"))
    try:
        result = done.chorus(*command, "--out", tmp_path / "out")
    finally:
        done.faults.task_result = None
    assert_one_sentence(result, 1, "disk takes no more", f"{tmp_path / 'out'}", "MB free")
    assert not (tmp_path / "out").exists()
