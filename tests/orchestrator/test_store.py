"""The store: submitting, the one door of a status, finished steps, requests, curves."""

from __future__ import annotations

import itertools
import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from orchestrator.job import FINISHED, IllegalSwitch, Reason, Status, run_status
from orchestrator.store.rows import NewJob, NewRun, Progress, Report
from orchestrator.store.store import NoSuchJob, StaleAttempt, Store
from workers.types import BadInput, StepDone, Validated

KEY = "5" * 64


def pipeline(key: str = KEY) -> NewRun:
    train = NewJob("a", "train", {"name": "a"}, {"steps": []}, "hash-a", "series-a", priority=5)
    fuse = NewJob("both", "fuse", {}, {}, "hash-both", "series-both", depends_on=("a",))
    return NewRun("demo", key, {"jobs": 2}, (train, fuse))


def step_done(step: int, loss: float = 1.0, attempt: int = 1) -> StepDone:
    return StepDone("a", attempt, step, loss, 0.5, 1e-3, 100, 0.25)


@pytest.fixture
def store(store_url):
    ticks = itertools.count(1)
    opened = Store(store_url, clock=lambda: float(next(ticks)))
    yield opened
    opened.close()


@pytest.fixture
def job(store):
    return store.jobs(store.submit(pipeline()))[0].id


def finish(store, job, *reasons):
    for reason in reasons:
        store.switch_status(job, reason)


def test_submit_new_pipeline_leaves_waiting_jobs_in_order(store):
    run = store.submit(pipeline())
    first, second = store.jobs(run)
    assert (first.name, first.status, first.reason) == ("a", Status.WAITING, Reason.SUBMITTED)
    assert second.depends_on == (first.id,)
    assert store.run(run).recipe == {"jobs": 2}


def test_submit_same_key_while_unfinished_returns_the_same_run(store):
    assert store.submit(pipeline()) == store.submit(pipeline())
    assert len(store.runs()) == 1


def test_submit_same_key_after_the_end_makes_a_new_run(store, job):
    run = store.job(job).run
    finish(store, job, Reason.CANCELLED_BY_USER)
    finish(store, f"{run}.both", Reason.PARENT_FAILED)
    assert store.submit(pipeline()) != run
    assert [row.status for row in store.runs()] == [Status.WAITING, Status.FAILED]


def test_submit_by_many_at_once_in_a_new_store_makes_one_run(store_url):
    def submit(_: int) -> str:
        store = Store(store_url)
        run = store.submit(pipeline())
        store.close()
        return run

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(16)))) == 1


def test_store_opened_while_another_process_makes_it_waits_for_it(tmp_path):
    """SQLite refuses a change to WAL beside another's write at once, whatever its busy timeout."""
    other = sqlite3.connect(tmp_path / "new.db", isolation_level=None)
    other.execute("CREATE TABLE made (x)")
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Store.open, tmp_path / "new.db")
        assert wait([opened], timeout=0.5).not_done
        other.execute("COMMIT")
        other.close()
        opened.result().close()


def test_store_opened_again_still_has_everything(store, store_url, job):
    again = Store(store_url)
    assert again.jobs() == store.jobs()
    assert again.events(job) == store.events(job)
    again.close()


def test_switch_status_through_a_life_writes_one_event_each(store, job):
    finish(store, job, Reason.PLACED, Reason.ATTACHED, Reason.STEPS_DONE, Reason.DONE)
    steps = [(event.before, event.after, event.reason) for event in store.events(job)]
    assert steps == [
        (None, Status.WAITING, Reason.SUBMITTED),
        (Status.WAITING, Status.STARTING, Reason.PLACED),
        (Status.STARTING, Status.RUNNING, Reason.ATTACHED),
        (Status.RUNNING, Status.STOPPING, Reason.STEPS_DONE),
        (Status.STOPPING, Status.SUCCEEDED, Reason.DONE),
    ]
    assert store.job(job).finished_at == store.events(job)[-1].at


def test_switch_status_that_changes_nothing_writes_no_event(store, job):
    store.switch_status(job, Reason.WAITS_FOR_HOST, "no room")
    before = store.events(job)
    store.switch_status(job, Reason.WAITS_FOR_HOST, "no room")
    assert store.events(job) == before


def test_switch_status_not_in_the_table_is_refused_and_leaves_no_trace(store, job):
    before = store.job(job), store.events(job)
    with pytest.raises(IllegalSwitch):
        store.switch_status(job, Reason.ATTACHED)
    assert (store.job(job), store.events(job)) == before


def test_switch_status_of_an_unknown_job_raises_no_such_job(store):
    with pytest.raises(NoSuchJob, match="nobody"):
        store.switch_status("nobody", Reason.PLACED)


def test_switch_status_of_a_stale_attempt_is_refused(store, job):
    finish(store, job, Reason.PLACED, Reason.HOST_LOST, Reason.PLACED)
    with pytest.raises(StaleAttempt):
        store.switch_status(job, Reason.ATTACHED, attempt=1)
    assert store.switch_status(job, Reason.ATTACHED, attempt=2).status is Status.RUNNING


def test_placed_begins_an_attempt_on_a_host_and_waiting_leaves_it(store, job):
    placed = store.switch_status(job, Reason.PLACED, host="h1")
    assert (placed.attempt, placed.host) == (1, "h1")
    waiting = store.switch_status(job, Reason.HOST_LOST)
    assert (waiting.attempt, waiting.host) == (1, None)
    assert store.switch_status(job, Reason.PLACED, host="h2").started_at == placed.started_at


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(list(Reason)), max_size=12))
def test_any_sequence_of_reasons_keeps_events_and_row_in_agreement(store, reasons):
    job = store.jobs(store.submit(pipeline(uuid4().hex)))[0].id
    for reason in reasons:
        try:
            store.switch_status(job, reason)
        except IllegalSwitch:
            continue
    events = store.events(job)
    assert events[-1].after is store.job(job).status
    assert all(later.before is earlier.after for earlier, later in itertools.pairwise(events))
    assert all(event.before not in FINISHED or event.before is event.after for event in events)


def test_write_progress_of_a_stale_attempt_changes_nothing(store, job):
    finish(store, job, Reason.PLACED, Reason.HOST_LOST, Reason.PLACED)
    store.write_progress(job, 1, Progress(9, 10, 0.1))
    assert store.job(job).step == 0
    store.write_progress(job, 2, Progress(4, 10, 0.5, 300.0))
    row = store.job(job)
    assert (row.step, row.num_steps, row.loss, row.tokens_per_second) == (4, 10, 0.5, 300.0)


def test_write_reports_of_a_stale_attempt_are_dropped_and_those_beside_them_written(store, job):
    other = f"{store.job(job).run}.both"
    finish(store, job, Reason.PLACED, Reason.HOST_LOST, Reason.PLACED)
    finish(store, other, Reason.PLACED)
    stale = Report(job, 1, "series-a", (step_done(9, attempt=1),), Progress(9))
    fresh = Report(other, 1, "series-both", (step_done(3), Validated("both", 1, 3, 0.4)), Progress(3, 7))
    store.write_reports([stale, fresh])
    assert (store.job(job).step, store.metrics(job)) == (0, ())
    assert (store.job(other).step, store.job(other).num_steps) == (3, 7)
    assert [(row.step, row.eval_loss) for row in store.metrics(other)] == [(3, 0.4)]


def test_submit_same_token_after_the_end_is_the_first_run(store):
    first = store.submit(replace(pipeline(), token="mine"))
    finish(store, f"{first}.a", Reason.CANCELLED_BY_USER)
    finish(store, f"{first}.both", Reason.PARENT_FAILED)
    assert store.submit(replace(pipeline(), token="mine")) == first
    assert len(store.runs()) == 1


def test_submit_same_content_under_two_tokens_is_two_runs(store):
    assert store.submit(replace(pipeline(), token="one")) != store.submit(replace(pipeline(), token="two"))


def test_submit_other_content_under_a_used_token_is_refused(store):
    first = store.submit(replace(pipeline(), token="mine"))
    with pytest.raises(BadInput, match=f"--key mine: it was used to submit {first}"):
        store.submit(replace(pipeline("6" * 64), token="mine"))
    assert len(store.runs()) == 1


def test_submit_same_token_by_many_at_once_makes_one_run(store_url):
    def submit(_: int) -> str:
        store = Store(store_url)
        run = store.submit(replace(pipeline(), token="mine"))
        store.close()
        return run

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(16)))) == 1


def test_events_cannot_be_changed_or_removed(store, job):
    before = store.events(job)
    for words in ("UPDATE events SET who = 'nobody'", "DELETE FROM events"):
        with pytest.raises(DBAPIError, match="append-only"), store._writer.begin() as db:
            db.execute(text(words))
    assert store.events(job) == before


def test_set_priority_writes_who_and_from_what_to_what(store, job):
    store.set_priority(job, 80, who="ann")
    store.set_priority(job, 80, who="ann")
    _, changed = store.events(job)
    assert (changed.who, changed.before, changed.after) == ("ann", Status.WAITING, Status.WAITING)
    assert (store.job(job).priority, changed.message) == (80, "priority 5 -> 80 by ann")


def test_unfinished_jobs_that_are_known_are_read_anew_in_all_that_changes(store, job):
    known = {row.id: row for row in store.unfinished_jobs()}
    finish(store, job, Reason.PLACED)
    assert store.unfinished_jobs(known=known) == store.unfinished_jobs()
    assert next(row for row in store.unfinished_jobs(known=known) if row.id == job).plan == {"steps": []}


def test_last_event_moves_with_every_submission_and_switch(store, job):
    seen = [store.last_event()]
    finish(store, job, Reason.PLACED)
    seen.append(store.last_event())
    store.submit(pipeline("7" * 64))
    assert sorted({*seen, store.last_event()}) == [*seen, store.last_event()]


def test_board_shows_what_was_put_up_last(store):
    assert store.boards.read("hosts") is None
    store.boards.show("hosts", [1])
    store.boards.show("hosts", [2, {"a": None}])
    assert store.boards.read("hosts").value == [2, {"a": None}]


def test_finish_step_twice_keeps_the_first_result(store, job):
    store.steps.finish("s1", "train", job, {"adapter_dir": "x"})
    store.steps.finish("s1", "train", job, {"adapter_dir": "y"})
    assert store.steps.read()["s1"].result == {"adapter_dir": "x"}


def test_finished_steps_of_a_choice_gives_only_those_recorded(store, job):
    store.steps.finish("s1", "train", job, {})
    store.steps.finish("s2", "evaluate", job, {})
    assert set(store.steps.read({"s2", "s3"})) == {"s2"}
    store.steps.forget("s2")
    assert set(store.steps.read()) == {"s1"}


def test_finished_ids_are_those_of_a_choice_however_large(store, job):
    for number in range(3):
        store.steps.finish(f"s{number}", "train", job, {"a": number})
    assert store.steps.finished({f"s{number}" for number in range(1, 1200)}) == {"s1", "s2"}
    assert store.steps.finished(set()) == set()


def test_request_stays_open_until_closed(store, job):
    store.request(job, "priority", who="ann", value=80)
    (request,) = store.open_requests()
    assert (request.job, request.kind, request.who, request.value) == (job, "priority", "ann", 80)
    store.close_request(request.id)
    assert store.open_requests() == ()


def test_request_of_a_finished_job_does_nothing(store, job):
    finish(store, job, Reason.CANCELLED_BY_USER)
    store.request(job, "cancel")
    assert store.open_requests() == ()


def test_epoch_of_a_controller_is_above_every_earlier_one_whatever_the_clock_says(store_url):
    now = [5000.0]
    with closing(Store(store_url, clock=lambda: now[0])) as store:
        assert store.epochs.newest() == 0
        epochs = [store.epochs.begin("ann"), store.epochs.begin("ann")]
        now[0] = 100.0
        epochs.append(store.epochs.begin("bob"))
        now[0] = 9000.0
        epochs.append(store.epochs.begin("bob"))
        assert epochs == [5000, 5001, 5002, 9000]
        assert store.epochs.newest() == 9000


def test_epochs_that_begin_at_once_are_all_different(store_url):
    with closing(Store(store_url, clock=lambda: 7.0)) as store, ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(lambda _: store.epochs.begin("ann"), range(12))) == list(range(7, 19))


def test_metrics_of_a_resumed_job_overwrite_by_step(store, job):
    store.curves.write("series-a", [step_done(1), step_done(2)], at=10.0)
    store.curves.write("series-a", [step_done(2, 0.9, 2), step_done(3, 0.8, 2)], at=20.0)
    store.curves.write("series-a", [Validated("a", 2, 3, 0.7)], at=20.0)
    rows = store.metrics(job)
    assert [(row.step, row.attempt, row.loss, row.eval_loss) for row in rows] == [
        (1, 1, 1.0, None),
        (2, 2, 0.9, None),
        (3, 2, 0.8, 0.7),
    ]
    assert [row.step for row in store.metrics(job, after=2)] == [3]


def test_metrics_that_are_not_finite_are_stored_as_none(store, job):
    store.curves.write(
        "series-a", [replace(step_done(1), loss=math.nan, grad_norm=math.inf, skipped=True)], 1.0
    )
    (row,) = store.metrics(job)
    assert (row.loss, row.grad_norm, row.skipped) == (None, None, True)


def test_unexported_points_are_given_once_even_when_steps_are_done_again(store):
    store.curves.write("s", [step_done(1), step_done(2), Validated("a", 1, 2, 0.7)], at=1.0)
    first = store.curves.unexported("s")
    assert ([row.step for row in first.steps], [row.loss for row in first.validations]) == ([1, 2], [0.7])
    store.curves.mark_exported("s", first)
    store.curves.write("s", [step_done(2, attempt=2), step_done(3, attempt=2)], at=2.0)
    assert [row.step for row in store.curves.unexported("s").steps] == [3]


@given(st.lists(st.sampled_from(list(Status)), min_size=1))
def test_run_status_is_finished_only_when_every_job_is(statuses):
    assert run_status(statuses).finished == all(status.finished for status in statuses)
    assert (run_status(statuses) is Status.SUCCEEDED) == (set(statuses) == {Status.SUCCEEDED})
