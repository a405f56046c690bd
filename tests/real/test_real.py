"""The recipes on real data, and the record of their run. The run itself takes some twenty minutes."""

from __future__ import annotations

import os

import pytest

from tests.real import record as real
from tests.real.record import FLOORS, Floor, Trained, record, verdict

ASKED = "CHORUS_REAL"


@pytest.mark.skipif(not real.DATA.is_dir(), reason="the real data are not beside the project")
@pytest.mark.skipif(ASKED not in os.environ, reason=f"takes some twenty minutes; set {ASKED}=1 to run it")
@pytest.mark.timeout(7200)
def test_real_recipes_run_to_the_end_and_are_recorded(tmp_path):
    assert real.main(["--home", str(tmp_path / "home"), "--out", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").iterdir()
    said = file.read_text()
    for name in ("finance-tweets", "coffee-orders", "web-areas", "travel-dialogues-zh", "travel-choice-zh"):
        assert f"| real-{name} |" in said
    assert str(tmp_path) not in said


def job(task, minutes=3.0):
    return {"task": task, "started_at": 100.0, "finished_at": 100.0 + 60 * minutes}


def test_record_says_of_each_floor_whether_the_adapter_beats_it():
    of_tweets = [
        {"task": "real-finance-tweets", "metric": "accuracy", "base": 0.2, "adapter": 0.7},
        {"task": "real-finance-tweets", "metric": "macro_f1", "base": 0.1, "adapter": 0.5},
    ]
    of_coffee = [{"task": "real-coffee-orders", "metric": "perplexity", "base": 90.0, "adapter": 9.0}]
    jobs = [
        Trained(job("real-finance-tweets"), of_tweets, 1234567),
        Trained(job("real-coffee-orders"), of_coffee, 1000),
    ]
    said = record(jobs, "chorus run", "2 cores", "2026-01-02").splitlines()
    better, worse = "better than the floor", "**worse than the floor**"
    tweets, coffee = "| real-finance-tweets |", "| real-coffee-orders |"
    ended = "1,234,567 | 3.0 |"
    assert [line for line in said if line.startswith("| real-")] == [
        f"{tweets} accuracy | 0.2 | 0.7 | 0.656 (majority class) | {better} | {ended}",
        f"{tweets} accuracy | 0.2 | 0.7 | 0.83 (n-gram logistic regression) | {worse} | {ended}",
        f"{tweets} macro_f1 | 0.1 | 0.5 | 0.759 (n-gram logistic regression) | {worse} | {ended}",
        f"{coffee} perplexity | 90 | 9 | 90 (base) | {better} | 1,000 | 3.0 |",
    ]


def test_verdict_of_a_score_that_only_meets_its_floor_is_equal():
    score = {"task": "t", "metric": "hit_at_1", "base": 0.1, "adapter": 0.335}
    assert verdict(score, Floor("hit_at_1", 0.335, "popularity")) == "equal"


def test_floors_name_tasks_that_the_recipes_train():
    recipes = "".join(file.read_text() for file in real.HERE.glob("*.yaml"))
    assert all(f"task: {task}\n" in recipes for task in FLOORS)
