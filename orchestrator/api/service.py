"""What can be asked of a home, and this process's own answer. Values are JSON: `-o json` prints them so.

`HomeService` reads and writes the store; `client.RemoteService` asks a `chorus api` the same over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from orchestrator.api.changes import change
from orchestrator.api.explaining import explanation
from orchestrator.api.find import find_job, find_jobs
from orchestrator.api.fitting import fit_views
from orchestrator.api.outcome import outcome
from orchestrator.api.queue_view import Queue, claim_view, seconds_left, teams
from orchestrator.api.submitting import plan_of, put
from orchestrator.api.views import event_view, job_view, metric_view, run_view, steps_view
from orchestrator.contracts import Registry
from orchestrator.control.show import read_progress, read_snapshot, works_elsewhere
from orchestrator.control.submission import read_order
from orchestrator.home import Home
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.recipe.teams import load_policy
from orchestrator.store.rows import JobRow, RequestKind
from orchestrator.store.store import NoSuchJob, Store
from orchestrator.who import user

Value = dict[str, Any]
Seen = tuple[int, int]
"""The last event's number and the last step."""
NOTHING_SEEN: Seen = (0, -1)


class Service(Protocol):
    """References are ids or names of jobs and runs. Each raises NoSuchJob for one that there is not."""

    @property
    def place(self) -> str:
        """The home's folder, or the server's address."""
        ...

    @property
    def flag(self) -> str:
        """How a command is told of this place; empty for the default home."""
        ...

    @property
    def folder_flag(self) -> str | None:
        """The same for one that works in the home's folder alone; None where that is not this machine's."""
        ...

    def at_work(self) -> bool:
        """Whether a controller works there, or on the same store from another home."""
        ...

    def jobs(self, everything: bool) -> list[Value]:
        """Those that are not finished and those of the newest run, or all."""
        ...

    def status(self, reference: str) -> Value:
        """A job with its `steps` and `events`; or a run with its `jobs` and `outcome`."""
        ...

    def lines(self, job: str, seen: Seen = NOTHING_SEEN) -> Value:
        """The `lines` of a job's story beyond `seen`, the new `seen`, and the `job` as it is now."""
        ...

    def events(self, job: str) -> list[Value]:
        """All that happened to a job, the oldest first."""
        ...

    def explain(self, job: str) -> Value:
        """Why it waits, who goes first, what would have to be freed."""
        ...

    def hosts(self) -> Value:
        """The `hosts` that the controller last showed, and when."""
        ...

    def teams(self) -> list[Value]:
        """Teams with unfinished jobs: the share of the ranks that each has, and what its turn goes by."""
        ...

    def submit(self, file: Path, key: str | None) -> Value:
        """The run that the file's jobs are in, durable at the return. Raises BadInput."""
        ...

    def change(self, reference: str, kind: RequestKind, value: Any = None) -> Value:
        """The `jobs` that were not finished, and whether it is `done` or was asked of the one at work."""
        ...


class HomeService:
    """The store is opened when it is first needed, and made by a submission alone.

    `who` stands in the events of what is changed.
    """

    def __init__(
        self,
        home: Home,
        open_store: Callable[[], Store],
        open_registry: Callable[[], AbstractContextManager[Registry]],
        who: str | None = None,
    ) -> None:
        self._home = home
        self._open_store = open_store
        self._open_registry = open_registry
        self._who = who or caller()

    @cached_property
    def _store(self) -> Store:
        return self._open_store()

    @property
    def _kept(self) -> Store:
        if not self._home.has_store:
            raise NoSuchJob(f"nothing was submitted in {self._home.folder} yet; `chorus run FILE` does that")
        return self._store

    @property
    def place(self) -> str:
        return str(self._home.folder)

    @property
    def flag(self) -> str:
        return self._home.flag()

    @property
    def folder_flag(self) -> str:
        return self._home.folder_flag()

    def at_work(self) -> bool:
        return self._home.claimed() or (
            self._home.has_store and works_elsewhere(self._store, self._home.folder)
        )

    # ---- to look ----

    def jobs(self, everything: bool) -> list[Value]:
        return _views(self._store, _shown(self._store, everything)) if self._home.has_store else []

    def status(self, reference: str) -> Value:
        jobs = find_jobs(self._kept, reference)
        if reference in (jobs[0].id, jobs[0].name):
            return _one_job(self._kept, jobs[0])
        run = self._kept.run(jobs[0].run)
        found = outcome(self._kept, jobs).to_json()
        return {**run_view(run), "jobs": _views(self._kept, jobs), "outcome": found}

    def lines(self, job: str, seen: Seen = NOTHING_SEEN) -> Value:
        found = find_job(self._kept, job)
        events = [event for event in self._kept.events(found.id) if event.id > seen[0]]
        points = self._kept.metrics(found.id, seen[1])
        lines = [event_view(event) for event in events] + [metric_view(point) for point in points]
        last = (max((e.id for e in events), default=seen[0]), max((p.step for p in points), default=seen[1]))
        return {
            "lines": sorted(lines, key=lambda line: line["at"]),
            "seen": list(last),
            "job": job_view(found),
        }

    def events(self, job: str) -> list[Value]:
        return [event_view(event) for event in self._kept.events(find_job(self._kept, job).id)]

    def explain(self, job: str) -> Value:
        row = find_job(self._kept, job)
        found, decided_at = explanation(self._kept, row)
        return {
            **{"job": row.id, "status": row.status.value, "decided_at": decided_at},
            **asdict(found),
            "at_work": self.at_work(),
        }

    def hosts(self) -> Value:
        queue = Queue.read(self._kept)
        return {"at_work": self.at_work(), "at": queue.at, "hosts": [dict(host) for host in queue.hosts]}

    def teams(self) -> list[Value]:
        policy = load_policy(self._home.folder / "teams.yaml")
        shown = read_snapshot(self._kept)
        usage: Mapping[str, float] = shown[0].usage if shown else {}
        rows = teams(self._kept.unfinished_jobs(), Queue.read(self._kept).hosts)
        return [{**row, **claim_view(policy, usage, row["team"])} for row in rows]

    # ---- to change ----

    def submit(self, file: Path, key: str | None) -> Value:
        pipeline = load_pipeline(file)
        with ExitStack() as stack:
            plan, digests = plan_of(pipeline, self._open_registry, stack)
            fit = fit_views(self._store, plan, pipeline)
            done = put(self._store, plan, digests, self._who, key)
        return {
            **run_view(self._store.run(done.run)),
            "jobs": [{**job_view(job), "fit": fit.get(job.name)} for job in done.jobs],
            "notices": list(pipeline.notices),
            "nothing_to_do": done.nothing_to_do,
            "at_work": self.at_work(),
        }

    def change(self, reference: str, kind: RequestKind, value: Any = None) -> Value:
        jobs = [job for job in find_jobs(self._kept, reference) if not job.status.finished]
        changed, done = change(self._store, self._home, jobs, kind, self._who, value) if jobs else ([], True)
        return {"jobs": changed, "done": done}


def caller() -> str:
    """Who gives this command, for the events."""
    return user()[:80]


def _shown(store: Store, everything: bool) -> tuple[JobRow, ...]:
    if everything:
        return store.jobs()
    newest = store.newest_run()
    found = {job.id: job for job in (*store.unfinished_jobs(), *(store.jobs(newest.id) if newest else ()))}
    return tuple(sorted(found.values(), key=lambda job: job.submitted_at))


def _views(store: Store, jobs: Iterable[JobRow]) -> list[Value]:
    """What only the store as a whole tells of a job goes beside what its row does."""
    queue, progress = Queue.read(store), read_progress(store)
    return [
        {
            **job_view(job),
            "position": queue.position(job),
            "seconds_left": seconds_left(store, job),
            "progress": progress.get(job.id) if job.status.value == "RUNNING" else None,
        }
        for job in jobs
    ]


def _one_job(store: Store, job: JobRow) -> Value:
    (view,) = _views(store, [job])
    events: Sequence[Value] = [event_view(event) for event in store.events(job.id)]
    steps = read_order(job.plan).job.steps
    done = store.steps.finished({step.id for step in steps})
    return {**view, "steps": steps_view(steps, done), "events": events}
