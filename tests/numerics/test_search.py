"""A search for weights on the resident base: by trials that can stop and go on, and disturb no training."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.numerics.distil import parents
from tests.numerics.jobs import adapters, assert_same_bits, attach, run, test_base, three_jobs
from tests.numerics.pair import two_ranks
from workers import searches
from workers.adapter import read_adapter
from workers.fuse import fuse
from workers.hang import VARIABLE
from workers.host import Host
from workers.ranks import Ranks
from workers.search import TRIALS, Search, Trial, read_table, write_table
from workers.types import (
    BadInput,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    EvaluationSpec,
    FuseTask,
    Progress,
    SearchAdvanced,
    SearchDone,
    SearchSpec,
    SearchTask,
    SearchWeights,
)


def plan(folder: Path, base, name: str = "search", **changes) -> SearchSpec:
    """A search over two parents, each judged by its own rows."""
    teachers = parents(folder, base)
    tasks = tuple(
        SearchTask(task, "loss", True, EvaluationSpec(teacher.train, 256), floor=0.9)
        for task, teacher in zip(("left", "right"), teachers, strict=True)
    )
    fusion = FuseTask(tuple(t.adapter_dir for t in teachers), (0.7, 0.4), "cat", None, str(folder / name))
    spec = SearchSpec(fusion, tasks, 12, str(folder / f"{name}-trials"), seed=3)
    return replace(spec, **changes)


def searched(ranks: Ranks, base, spec: SearchSpec, most: int = 1000):
    host, events = Host.load(base, ranks), []
    host.apply(SearchWeights("s", spec))
    while host.busy and most:
        events += host.tick()
        most -= 1
    return events


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    base = test_base(folder)
    spec = plan(folder, base)
    *advanced, event = searched(Ranks(), base, spec)
    assert isinstance(event, SearchDone), event
    assert advanced == [SearchAdvanced("s", Progress(n, 12)) for n in range(1, 13)]
    return base, spec, event.report


def test_search_tries_the_given_weights_then_equal_ones_then_others(done):
    _, spec, report = done
    trials = report["search"]["trials"]
    assert [trial["weights"] for trial in trials[:2]] == [((0.7, 0.4),), ((1.0, 1.0),)]
    assert len({trial["weights"] for trial in trials}) == len(trials) == spec.trials


def test_search_writes_the_adapter_of_its_best_trial(done):
    _, spec, report = done
    trials = report["search"]["trials"]
    best = max(trials, key=lambda trial: (trial["meets_floors"], trial["aim"]))
    assert report["search"]["best"] == best["number"]
    expected, _ = fuse([read_adapter(Path(d)) for d in spec.plan.adapter_dirs], best["weights"][0])
    assert_same_bits(read_adapter(Path(spec.plan.out_dir)).factors, expected.factors)


def test_search_scores_are_those_of_an_evaluation_of_the_same_folder(done):
    base, spec, report = done
    best = report["search"]["trials"][report["search"]["best"]]
    host = Host.load(base, Ranks())
    for task in spec.tasks:
        host.apply(Evaluate("e", spec.plan.out_dir, task.evaluation))
        (event,) = host.tick()
        assert isinstance(event, EvaluationDone)
        found = event.report.metrics["loss"]
        assert found == pytest.approx(best["scores"][f"{task.task}.loss"], rel=1e-6)
        kept = report["search"]["parents"][f"{task.task}.loss"] / found
        assert kept == pytest.approx(best["retention"][f"{task.task}.loss"], rel=1e-6)


def test_search_marks_the_trials_that_no_other_dominates(done):
    trials = done[2]["search"]["trials"]
    for trial in trials:
        beaten = any(
            all(other["retention"][key] >= value for key, value in trial["retention"].items())
            and other["retention"] != trial["retention"]
            for other in trials
        )
        assert trial["pareto"] is not beaten


def test_search_that_was_stopped_goes_on_with_the_same_trials(done, tmp_path):
    base, spec, report = done
    again = replace(
        spec, plan=replace(spec.plan, out_dir=str(tmp_path / "out")), trials_dir=str(tmp_path / "trials")
    )
    assert [event.trials.done for event in searched(Ranks(), base, again, most=5)] == [1, 2, 3, 4, 5]
    file = Path(again.trials_dir) / TRIALS
    file.write_text(file.read_text() + '{"number": 5, "wei')  # torn
    *_, event = searched(Ranks(), base, again)
    assert isinstance(event, SearchDone)
    assert json.dumps(event.report["search"]) == json.dumps(report["search"])


def test_search_on_two_ranks_is_the_same_search(done, tmp_path):
    base, spec, report = done
    again = replace(
        spec, plan=replace(spec.plan, out_dir=str(tmp_path / "out")), trials_dir=str(tmp_path / "trials")
    )
    *_, event = two_ranks(searched, base, again)
    assert isinstance(event, SearchDone)
    found, expected = ([trial["weights"] for trial in r["search"]["trials"]] for r in (event.report, report))
    assert found[:8] == expected[:8]  # drawn at random; later ones may differ by the scores' last digits
    best = event.report["search"]["trials"][event.report["search"]["best"]]
    assert best["aim"] == pytest.approx(report["search"]["trials"][report["search"]["best"]]["aim"], rel=1e-3)


def test_search_leaves_those_that_train_meanwhile_bit_identical(tmp_path):
    base = test_base(tmp_path)
    jobs = three_jobs(tmp_path, steps=6)
    plain = adapters(run(base, {0: attach(*jobs)}))
    moved = [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-beside") for job in jobs]
    spec = plan(tmp_path, base, trials=3)
    events = run(base, {0: [*attach(*moved), SearchWeights("s", spec)]})
    assert any(isinstance(event, SearchDone) for event in events)
    for job in jobs:
        assert_same_bits(adapters(events)[job.job].factors, plain[job.job].factors)


def test_search_by_groups_gives_modules_weights_of_their_own(tmp_path):
    base = test_base(tmp_path)
    spec = plan(tmp_path, base, groups=("self_attn", "mlp"), trials=4)
    *_, event = searched(Ranks(), base, spec)
    assert isinstance(event, SearchDone)
    assert set(event.report["groups"]) == {"self_attn", "mlp"}
    trial = event.report["search"]["trials"][3]
    assert [len(group) for group in trial["weights"]] == [2, 2]
    assert trial["weights"][0] != trial["weights"][1]
    best = event.report["search"]["trials"][event.report["search"]["best"]]["weights"]
    parents_ = [read_adapter(Path(folder)) for folder in spec.plan.adapter_dirs]
    found = read_adapter(Path(spec.plan.out_dir)).factors
    for part, weights in zip(spec.groups, best, strict=True):
        expected = fuse(parents_, weights)[0].factors
        names = [name for name in found if part in name]
        assert names
        assert_same_bits({n: found[n] for n in names}, {n: expected[n] for n in names})


def test_search_over_adapters_that_cannot_be_fused_fails_in_words(tmp_path):
    base = test_base(tmp_path)
    spec = plan(tmp_path, base)
    broken = replace(spec, plan=replace(spec.plan, rule="svd", rank=None))
    *_, event = searched(Ranks(), base, broken)
    assert isinstance(event, EvaluationFailed)
    assert "needs a rank" in event.message


def without_a_parent_on_rank_1(ranks: Ranks, base, spec: SearchSpec):
    def refuses(folder: Path):
        raise OSError(f"{folder} is away")

    read = searches.read_adapter
    searches.read_adapter = refuses if ranks.rank == 1 else read
    try:
        return searched(ranks, base, spec)
    finally:
        searches.read_adapter = read


def test_search_whose_table_rank_0_refuses_fails_on_all_ranks(tmp_path):
    base = test_base(tmp_path)
    spec = plan(tmp_path, base)
    (tmp_path / "search-trials").mkdir()
    (tmp_path / "search-trials" / TRIALS).write_text('{"number": 3, "weights": [[1.0, 1.0]]}\n')
    (event,) = two_ranks(searched, base, spec)
    assert isinstance(event, EvaluationFailed)
    assert "is not the table of this search" in event.message


def test_search_over_a_parent_that_one_rank_cannot_read_fails_on_all_ranks(tmp_path):
    base = test_base(tmp_path)
    (event,) = two_ranks(without_a_parent_on_rank_1, base, plan(tmp_path, base))
    assert isinstance(event, EvaluationFailed)
    assert "is away" in event.message


def test_search_that_fuses_for_long_is_heard_of_by_the_peers_meanwhile(tmp_path, monkeypatch):
    begun, heard, fuse_folders = threading.Event(), threading.Event(), searches.fuse_folders

    class Peers(Ranks):
        def broadcast(self, value):
            if begun.is_set():
                heard.set()
            return value

    def slowly(task):
        begun.set()
        assert heard.wait(60)
        return fuse_folders(task)

    monkeypatch.setattr(searches, "fuse_folders", slowly)
    monkeypatch.setenv(VARIABLE, "1")
    base = test_base(tmp_path)
    *_, event = searched(Peers(), base, plan(tmp_path, base, trials=1))
    assert isinstance(event, SearchDone)


# ---- the aim, the table ---------------------------------------------------------------------------------


def test_search_aim_counts_a_task_below_its_floor_more_than_what_another_gains(tmp_path):
    search = Search(plan(tmp_path, test_base(tmp_path)), {"left.loss": 1.0, "right.loss": 1.0})
    both = search.judge(((1.0, 1.0),), {"left.loss": 1.1, "right.loss": 1.1})
    one = search.judge(((1.0, 0.0),), {"left.loss": 0.5, "right.loss": 1.4})
    assert both.meets_floors
    assert not one.meets_floors
    assert both.aim > one.aim
    assert one.retention["left.loss"] == 2.0  # more than all of a parent is told, and counts as all of it
    assert one.aim == pytest.approx((1 + 1 / 1.4) / 2 - (0.9 - 1 / 1.4))


def test_search_score_that_is_not_finite_keeps_nothing(tmp_path):
    search = Search(plan(tmp_path, test_base(tmp_path)), {"left.loss": 1.0, "right.loss": 1.0})
    trial = search.judge(((1.0, 1.0),), {"left.loss": None, "right.loss": 1.0})
    assert trial.retention == {"left.loss": 0.0, "right.loss": 1.0}


def test_search_table_reads_back_what_was_written(tmp_path):
    search = Search(plan(tmp_path, test_base(tmp_path)), {"left.loss": 1.0, "right.loss": 2.0})
    search.trials.append(Trial(0, ((0.7, 0.4),), {"left.loss": 0.5}, {"left.loss": 2.0}, 0.1))
    write_table(search)
    assert read_table(search.spec) == search


@pytest.mark.parametrize(
    "line",
    [
        "3",
        '{"parents": {"others.loss": 1.0}}',
        '{"parents": 1}',
        '{"number": 0}',
        '{"number": 0, "weights": [1.0]}',
        '{"number": 0, "weights": [[1.0]], "colour": "red"}',
    ],
)
def test_search_table_of_something_else_is_refused(done, tmp_path, line):
    spec = replace(done[1], trials_dir=str(tmp_path))
    (tmp_path / TRIALS).write_text(line + "\n")
    with pytest.raises(BadInput, match="is not the table of this search; remove it"):
        read_table(spec)


def test_search_goes_past_weights_that_yield_no_finite_score(tmp_path):
    base = test_base(tmp_path)
    spec = plan(tmp_path, base, trials=3)
    wild = replace(spec, plan=replace(spec.plan, weights=(1e30, 1e30)))
    *_, event = searched(Ranks(), base, wild)
    assert isinstance(event, SearchDone), event
    trials = event.report["search"]["trials"]
    assert trials[0]["scores"] == {"left.loss": None, "right.loss": None}
    assert event.report["search"]["best"] != 0
