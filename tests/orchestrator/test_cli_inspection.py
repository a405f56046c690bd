"""`adapters list` with filters, `verify`, `lineage`, `diff`, `history`, `gates`."""

from __future__ import annotations

import pytest

from tests.orchestrator import fakes
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence

pytestmark = pytest.mark.usefixtures("unsynced")

FINANCE, SUPPORT, FUSED = "tiny.finance-sentiment", "tiny.support", "tiny.multitask"


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A world with three champions; tests only read it."""
    world = CliWorld(tmp_path_factory.mktemp("done"))
    assert world.chorus("run", world.two_jobs()).exit_code == 0
    return world


def better_finance():
    """Later evaluations of a classification find more."""
    patch = pytest.MonkeyPatch()
    patch.setitem(fakes.METRICS, "classification", {"macro_f1": 0.95, "accuracy": 0.8, "loss": 0.1})
    return patch


# ---- list -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--task", "support"], {SUPPORT, FUSED}),
        (["--task", "multitask"], {FUSED}),
        (["--metric", "macro_f1 >= 0.9"], {FINANCE, FUSED}),
        (["--metric", "support.perplexity<=5", "--metric", "macro_f1>0.5"], {FUSED}),
        (["--metric", "macro_f1 > 0.9"], set()),
        (["--alias", "champion", "--task", "finance-sentiment"], {FINANCE, FUSED}),
        (["--alias", "canary"], set()),
        (["--parent", FINANCE], {FUSED}),
        (["--parent", f"{FINANCE}/2"], set()),
        (["--base", "no-such-base"], set()),
    ],
)
def test_list_shows_what_every_filter_lets_through(done, filters, found):
    assert {version["name"] for version in done.read("adapters", "list", *filters)} == found


def test_list_filters_by_the_name_or_the_digest_of_a_base(done):
    tags = done.read("adapters", "show", f"{FUSED}@1")["tags"]
    for base in (tags["base.name"], tags["base.digest"][:8]):
        assert len(done.read("adapters", "list", "--base", base)) == 3


@pytest.mark.parametrize(
    ("metric", "words"),
    [("macro_f1", "an operator"), ("f1 > 0.5", "'f1' is not measured"), ("macro_f1 > high", "not a bound")],
)
def test_list_with_a_metric_that_makes_no_sense_is_refused(done, metric, words):
    assert_one_sentence(done.chorus("adapters", "list", "--metric", metric), 2, "--metric", words)


# ---- verify ---------------------------------------------------------------------------------------------


def test_verify_of_an_untouched_registry_finds_nothing(done):
    assert done.read("adapters", "verify") == {"versions": 3, "problems": []}
    assert "3 versions of 3 names checked: nothing was altered" in done.chorus("adapters", "verify").stdout


def test_verify_names_what_was_altered_and_exits_with_3(world):
    world.chorus("run", world.one_job())
    (stored,) = world.registry.store.iterdir()
    (stored / "adapter_model.safetensors").write_text("other bytes")
    result = world.chorus("adapters", "verify")
    assert result.exit_code == 3
    assert f"{FINANCE}/1: {FINANCE}/1 was altered" in result.stdout


def test_verify_of_a_name_of_which_nothing_is_known_is_not_found(done):
    assert done.chorus("adapters", "verify", FINANCE).exit_code == 0
    assert_one_sentence(done.chorus("adapters", "verify", "misspelt"), 102, "misspelt")


# ---- lineage --------------------------------------------------------------------------------------------


def test_lineage_of_a_fusion_names_its_parents(done):
    value = done.read("adapters", "lineage", f"{FUSED}@champion")
    assert [parent["version"] for parent in value["parents"]] == [f"{FINANCE}/1", f"{SUPPORT}/1"]
    assert value["children"] == []
    lines = done.chorus("adapters", "lineage", f"{FUSED}@champion").stdout.splitlines()
    assert lines[0].startswith(f"{FUSED}/1 (candidate, champion): multitask on ")
    assert lines[1].startswith(f"  from {FINANCE}/1")


def test_lineage_of_a_parent_names_what_was_made_from_it(done):
    value = done.read("adapters", "lineage", f"{SUPPORT}/1")
    assert [child["version"] for child in value["children"]] == [f"{FUSED}/1"]
    assert f"  into {FUSED}/1" in done.chorus("adapters", "lineage", f"{SUPPORT}/1").stdout


def test_lineage_says_which_parent_is_gone(world):
    world.chorus("run", world.two_jobs())
    del world.registry._versions[SUPPORT, 1]
    assert f"from {SUPPORT}/1, which is no longer" in world.chorus("adapters", "lineage", f"{FUSED}/1").stdout


# ---- diff -----------------------------------------------------------------------------------------------


def test_diff_shows_scores_tags_and_recipe_that_differ(world):
    world.chorus("run", world.one_job())
    patch = better_finance()
    try:
        world.chorus("run", world.one_job(seed=7))
    finally:
        patch.undo()
    value = world.read("adapters", "diff", f"{FINANCE}/1", f"{FINANCE}/2")
    assert value["scores"]["finance-sentiment.macro_f1"]["scores"] == [0.9, 0.95]
    assert "recipe.digest" in value["tags"]
    assert "base.digest" not in value["tags"]
    assert {"-seed: 0", "+seed: 7"} <= set(value["recipe"])
    shown = world.chorus("adapters", "diff", f"{FINANCE}/1", f"{FINANCE}/2").stdout
    assert "+seed: 7" in shown


# ---- history --------------------------------------------------------------------------------------------


def test_history_tells_every_move(world):
    world.chorus("run", world.one_job())
    world.chorus("run", world.one_job(seed=7))
    world.chorus("rollback", FINANCE)
    found = world.read("adapters", "history", FINANCE)
    assert [(r["number"], r["kind"], r["from"], r["to"]) for r in found] == [
        (1, "promote", None, 1),
        (2, "promote", 1, 2),
        (3, "rollback", 2, 1),
    ]
    assert found[0]["figures"]["finance-sentiment.macro_f1"] == 0.9
    rows = [line.split() for line in world.chorus("adapters", "history", FINANCE).stdout.splitlines()]
    assert [row[-1] for row in rows[1:]][2] == "rollback"


def test_history_of_an_unknown_name_is_not_found_and_of_one_without_champion_says_so(world):
    world.chorus("run", world.one_job(registry={"promote": False}))
    assert_one_sentence(world.chorus("adapters", "history", "no.such"), 102, "no.such")
    assert "no version" in world.chorus("adapters", "history", FINANCE).stdout


# ---- gates of a name ------------------------------------------------------------------------------------


def test_gates_of_a_name_hold_for_promote_and_for_later_runs(world, tmp_path):
    world.chorus("run", world.one_job(registry={"promote": False}))
    file = tmp_path / "gates.yaml"
    file.write_text('gates: {finance-sentiment.macro_f1: ">= 0.95"}\n')
    assert world.read("adapters", "gates", FINANCE) == {}
    shown = world.read("adapters", "gates", FINANCE, "--file", file)
    assert shown == {"gates": {"finance-sentiment.macro_f1": ">= 0.95"}}
    assert_one_sentence(world.chorus("promote", FINANCE, "1"), 3, "required >= 0.95: short by 0.05")
    assert world.chorus("run", world.one_job(seed=7)).exit_code == 100
    file.write_text("")
    assert world.read("adapters", "gates", FINANCE, "--file", file) == {}
    assert world.chorus("promote", FINANCE, "1").exit_code == 0


def test_gates_that_make_no_sense_are_refused_and_change_nothing(world, tmp_path):
    world.chorus("run", world.one_job())
    file = tmp_path / "gates.yaml"
    file.write_text("gates: {macro_f1: '>= 0.95'}\n")
    assert_one_sentence(world.chorus("adapters", "gates", FINANCE, "--file", file), 2, str(file), "no task")
    assert world.read("adapters", "gates", FINANCE) == {}


def test_worst_task_of_a_fusion_keeps_it_back(world):
    result = world.chorus("run", world.two_jobs(evaluation={"worst_task": ">= 1.5"}))
    assert result.exit_code == 100
    assert_one_sentence(world.chorus("promote", FUSED, "1"), 3, "the worst task is", "short by 0.5")
