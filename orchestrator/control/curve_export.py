"""Training curves from the store to the registry, and the runs they belong to. Late is fine, lost is not.

While the registry does not answer, points stay in the store; `Backoff` says when to try again. The registry
is spoken to by `Errands`: `send` and what it calls write nothing into the store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from orchestrator.contracts import MetricPoint, Registry, RegistryUnreachable
from orchestrator.control.errands import Errands
from orchestrator.control.submission import Order
from orchestrator.plan.steps import EvaluateWhat, FuseWhat, SearchWhat
from orchestrator.registry.answers import DTYPE_TAG
from orchestrator.store.rows import Curves, MetricRow, ValidationRow
from orchestrator.store.store import Store
from workers.rules import as_given
from workers.types import DatasetSpec, DistillSpec, Teacher

EXPORT_EVERY = 3.0
"""Seconds between two looks for new points, at least."""
JOBS_A_SECOND = 1.0
"""Each job's points are requests to the registry: with many jobs they go more rarely, more at a time."""
POINTS_AT_ONCE = 1000
"""Steps of a series in one errand."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0

Ending = Literal["FAILED", "KILLED"]

log = logging.getLogger(__name__)


class Backoff:
    """When a service that did not answer is tried again: after 1, 2, 4 ... 60 seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wait = 0.0
        self._until = 0.0

    @property
    def away(self) -> bool:
        return self._clock() < self._until

    def failed(self) -> None:
        """Once for all that failed in the same absence: several may have been under way."""
        if self.away:
            return
        self._wait = min(LONGEST_WAIT, self._wait * 2 or FIRST_WAIT)
        self._until = self._clock() + self._wait

    def worked(self) -> None:
        self._wait = self._until = 0.0


class CurveExport:
    """Runs of the jobs at hand, and their points."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        errands: Errands,
        backoff: Backoff,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._registry = registry
        self._errands = errands
        self._backoff = backoff
        self._clock = clock
        self._next = 0.0
        self._runs: dict[str, str] = {}
        self._late: dict[str, Order] = {}
        """Series whose points are to be exported as soon as there is a way."""
        self._ended: dict[str, tuple[Order, Ending]] = {}

    def tick(self, orders: Iterable[Order]) -> None:
        """Have exported what has come since the last time, if it is time and the registry answers."""
        if not self._backoff.away and self._clock() >= self._next:
            self._look(orders)
        self._send_late()

    def close(self, orders: Iterable[Order]) -> None:
        """One last try, whatever the clock says."""
        self._look(orders)
        self._send_late()

    def _look(self, orders: Iterable[Order]) -> None:
        pending = self._store.curves.pending()
        late = {order.series: order for order in orders if order.series in pending}
        self._next = self._clock() + max(EXPORT_EVERY, len(late) / JOBS_A_SECOND)
        self._late |= late | {series: order for series, (order, _) in self._ended.items()}

    def end(self, order: Order, status: Ending) -> None:
        """Mark the run of a job that will not be registered; when the registry answers."""
        if order.series in self._runs or self._store.curves.read(order.series):
            self._ended[order.series] = order, status

    def keep_only(self, orders: Iterable[Order]) -> None:
        """Forget the runs of other jobs, but of those of whose end the registry is still to be told."""
        kept = {order.series for order in orders} | self._late.keys() | self._ended.keys()
        self._runs = {series: run for series, run in self._runs.items() if series in kept}

    # ---- asked of the registry ---------------------------------------------------------------------------

    def _send_late(self) -> None:
        for series, order in list(self._late.items()):
            if self._backoff.away:
                return
            if self._errands.free(lane := {series}, comes_again=True):
                del self._late[series]
                _, ending = self._ended.get(series, (order, None))
                ask = partial(self._send_and_end, order, ending)
                self._errands.begin(lane, ask, partial(self._answered, order, ending))

    def _send_and_end(self, order: Order, ending: Ending | None) -> Curves:
        sent = self.send(order)
        # Before its points are marked: who is killed in between finds them, and ends the run again.
        if ending is not None and _last(sent):
            self._registry.end_run(self.run_of(order), ending)
        return sent

    def _answered(self, order: Order, ending: Ending | None, answer: Future[Curves]) -> bool:
        try:
            sent = answer.result()
            self.sent(order, sent)
        except RegistryUnreachable:
            self._backoff.failed()
        except Exception:
            # A curve is not worth a job: it stays in the store, and registering says what is wrong.
            log.exception("the curves could not be exported")
            self._backoff.failed()
        else:
            if not _last(sent):
                self._late[order.series] = order
            elif ending is not None:
                self._ended.pop(order.series, None)
            if ending is not None or sent != Curves():
                self._backoff.worked()
        self._send_late()
        return False

    def run_of(self, order: Order) -> str:
        """The registry's run of a job, made with its inputs and recipe if absent."""
        if order.series not in self._runs:
            self._runs[order.series] = self._start_run(order)
        return self._runs[order.series]

    def behind(self, order: Order) -> bool:
        """Whether the registry lacks points of a job."""
        return self._store.curves.unexported(order.series, limit=1) != Curves()

    def send(self, order: Order) -> Curves:
        """Tell the registry the next points that it lacks of a job, if any. Raises RegistryUnreachable."""
        curves = self._store.curves.unexported(order.series, POINTS_AT_ONCE)
        if curves != Curves():
            self._registry.log_metrics(self.run_of(order), points_of(curves))
        return curves

    def sent(self, order: Order, curves: Curves) -> None:
        """The registry has them now."""
        if curves != Curves():
            self._store.curves.mark_exported(order.series, curves)

    def _start_run(self, order: Order) -> str:
        job = order.job
        run_id = self._registry.start_run(
            order.series, order.experiment, job.name, params(order), tags(order)
        )
        if inputs := run_inputs(order):
            self._registry.log_inputs(run_id, inputs)
        self._registry.log_text(run_id, "recipe.yaml", order.registered.recipe_yaml)
        return run_id


# ---- what a run says of its job ------------------------------------------------------------------------


def params(order: Order) -> dict[str, str]:
    """Hyper-parameters under the names of a recipe, or the plan of a fusion."""
    if order.train is not None:
        spec = order.train.spec
        figures = asdict(spec.adapter) | asdict(spec.training) | _distilled(spec.distill)
        return {key: str(value) for key, value in figures.items()}
    what = next(step.what for step in order.job.steps if step.id == order.series)
    if isinstance(what, SearchWhat):
        searched = {**_of_rule(what.fuse), "weights": "searched"}
        return {**searched, "trials": str(what.trials), "groups": ", ".join(what.groups)}
    assert isinstance(what, FuseWhat)
    weights = ", ".join(f"{weight:g}" for _, weight in what.adapters)
    return {**_of_rule(what), "weights": weights}


def _of_rule(what: FuseWhat) -> dict[str, str]:
    options = {key: f"{value:g}" for key, value in as_given(what.options).items()}
    return {"rule": what.rule, "rank": str(what.rank), **options}


def _distilled(distill: DistillSpec | None) -> dict[str, Any]:
    if distill is None:
        return {}
    return {
        "rule": "distill",
        "weights": ", ".join(f"{teacher.weight:g}" for teacher in distill.teachers),
        "rows": ", ".join(str(teacher.batch_size) for teacher in distill.teachers),
        "temperature": distill.temperature,
        "labels": distill.labels,
    }


def tags(order: Order) -> dict[str, str]:
    """What a version is bound to; `base.digest` is the one that checkpoints and adapters carry."""
    what = order.registered
    return {
        "task": what.task,
        "base.name": order.job.base.name,
        "base.digest": what.base.all,
        DTYPE_TAG: order.job.base.dtype,
        "base.weights.digest": what.base.weights,
        "tokenizer.digest": what.base.tokenizer,
        "chat_template.digest": what.base.chat_template,
        "recipe.digest": what.recipe_digest,
        "data.digest": what.data_digest,
    }


def run_inputs(order: Order) -> dict[str, tuple[str, str]]:
    """Context -> (path, SHA-256) of the rows a job reads."""
    found: dict[str, tuple[str, str]] = {}
    if order.train is not None:
        spec = order.train.spec
        train = [*spec.train, *(rows for t in _teachers(spec.distill) for rows in t.train)]
        validation = [*spec.validation, *(rows for t in _teachers(spec.distill) for rows in t.validation)]
        found["training"] = (_paths(train), order.train.train_digest)
        found["validation"] = (_paths(validation), order.train.validation_digest)
    for step in order.job.steps:
        if isinstance(step.what, EvaluateWhat) and step.kind == "evaluate":
            context = "test" if order.job.kind == "train" else f"test.{step.what.task}"
            found[context] = (_paths(step.what.evaluation.datasets), step.what.dataset_digest)
    return {context: entry for context, entry in found.items() if entry[0]}


def _teachers(distill: DistillSpec | None) -> tuple[Teacher, ...]:
    return distill.teachers if distill else ()


def _paths(datasets: Sequence[DatasetSpec]) -> str:
    return ", ".join(dataset.path for dataset in datasets)


def _last(sent: Curves) -> bool:
    """Whether there were no more points than these."""
    return len(sent.steps) < POINTS_AT_ONCE and len(sent.validations) < POINTS_AT_ONCE


# ---- points --------------------------------------------------------------------------------------------


def points_of(curves: Curves) -> list[MetricPoint]:
    """The registry's points of stored rows; what was not finite has none."""
    points = [point for row in curves.steps for point in _step_points(row)]
    return points + [point for row in curves.validations for point in _validation_points(row)]


def _step_points(row: MetricRow) -> list[MetricPoint]:
    figures = {
        "loss": row.loss,
        "grad_norm": row.grad_norm,
        "learning_rate": row.learning_rate,
        "tokens_per_second": row.tokens / row.seconds if row.seconds > 0 else None,
    }
    when = int(row.at * 1000)
    return [MetricPoint(key, value, row.step, when) for key, value in figures.items() if value is not None]


def _validation_points(row: ValidationRow) -> list[MetricPoint]:
    if row.loss is None:
        return []
    return [MetricPoint("eval_loss", row.loss, row.step, int(row.at * 1000))]
