"""Submissions while commands, the controller and the store's server are killed: none lost, none doubled.

A client gives `chorus submit FILE --key TOKEN` until it is acknowledged (exit code 0), as one does who lost
the answer; now and then it gives one again that was acknowledged. Every other time it goes to a `chorus api`
rather than to the home, which is killed as well. A controller (`chorus serve`, its hosts in
its own process) trains and registers meanwhile, against a real MLflow server.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.api import tokens
from orchestrator.api.client import TOKEN_VARIABLE
from orchestrator.commands.api import api
from orchestrator.commands.cli import app
from orchestrator.commands.output import console
from orchestrator.commands.parts import ClusterChoice
from orchestrator.commands.serve import serve
from orchestrator.home import Home
from orchestrator.job import Status
from orchestrator.main import real_parts
from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from orchestrator.store.store import Store
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.processes import ended, forked
from tests.models import make_base, write_rows
from tests.orchestrator.recipe_files import LABELS, write_yaml
from tests.postgres import Postgres

AT_ONCE = 3
"""Clients that submit beside one another."""
AGAIN = 0.1
"""Share of submissions given once more after they were acknowledged."""
PATIENCE = 2400.0
"""Seconds that the last controller may take."""
LONGEST_SUBMIT = 0.8
"""Seconds: a command is killed up to so long after its start, most within their own."""
CONTROLLER_LIVES = (4.0, 45.0)
"""Seconds; the first two or so go by before it works, and a host's eight jobs take some twenty to finish."""
API_LIVES = (2.0, 20.0)
"""Seconds; it answers after one."""
KILLED = ("submit", "controller", "api", "store server")
KILLED_COMMANDS = 0.35
"""Share of commands that are given a moment to die at; many have ended by then."""


@dataclass
class Client:
    """One command under way."""

    token: str
    process: int
    out: Path
    dies_at: float


@dataclass
class Chaos:
    folder: Path
    server: Postgres
    chance: random.Random
    count: int
    wanted: int = 0
    """Kills, at least."""
    of_each: int = 0
    """The same of everything that is killed."""
    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, set[str]] = field(default_factory=dict)
    """Token -> the ids of runs that were told for it."""
    refused: Counter[int] = field(default_factory=Counter)
    """Exit codes of commands that were not killed and not acknowledged."""
    commands: int = 0
    clients: list[Client] = field(default_factory=list)
    lives: tuple[float, float] = CONTROLLER_LIVES
    controller: int | None = None
    controller_dies_at: float = 0.0
    api: int | None = None
    api_dies_at: float = 0.0

    def __post_init__(self) -> None:
        self.url = self.server.new_database()
        self.home = Home(self.folder / "home", self.url)
        self.port = free_port()
        self.secret = tokens.grant(self.home.folder, "client")
        self.waiting = [f"token-{number:04d}" for number in range(self.count)]
        make_base(self.folder / "bases" / "tiny")
        write_yaml(self.folder / "bases" / "tiny.yaml", {"model": "tiny", "tokens_per_tick": 512})
        for split in ("train", "validation", "test"):
            rows = [{"text": f"{split} {n}", "label": LABELS[n % 3]} for n in range(4)]
            write_rows(self.folder / f"data/{split}.jsonl", rows)
        for number, token in enumerate(self.waiting):
            write_yaml(self.folder / f"{token}.yaml", recipe(number))

    # ---- what lives, and for how long ----

    def run(self, store_every: int) -> None:
        """Until every submission is acknowledged and enough was killed; until then some are given again.

        The store's server dies after each so many of them.
        """
        due = store_every
        while self.waiting or self.clients or not self.enough():
            now = time.monotonic()
            if not (self.waiting or self.clients):
                self.waiting.append(self.chance.choice(sorted(self.acknowledged)))
            while self.waiting and len(self.clients) < AT_ONCE:
                self.give(self.waiting.pop(), now)
            self.hear(now)
            self.tend_controller(now)
            self.tend_api(now)
            if len(self.acknowledged) >= due:
                due += store_every
                self.server.kill()
                self.kills["store server"] += 1
                self.server.start()
            time.sleep(0.001)

    def enough(self) -> bool:
        each = all(self.kills[name] >= self.of_each for name in KILLED)
        return each and sum(self.kills.values()) >= self.wanted

    def finish(self, succeeded: int) -> None:
        """Let one controller work until so many jobs have succeeded; the others are cancelled, by request."""
        self.end_controller()
        self.end_api()
        self.lives = (PATIENCE, PATIENCE)
        with closing(Store(self.url)) as store:
            self.work_until(lambda: self.count_of(store, Status.SUCCEEDED) >= succeeded)
            for job in store.unfinished_jobs():
                store.request(job.id, "cancel")
            self.work_until(lambda: not store.unfinished_jobs())
        self.end_controller()

    def work_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            self.tend_controller(time.monotonic())
            assert time.monotonic() < deadline, "the jobs do not finish"
            time.sleep(0.5)

    @staticmethod
    def count_of(store: Store, status: Status) -> int:
        return sum(job.status is status for job in store.jobs())

    def give(self, token: str, now: float) -> None:
        out = self.folder / f"{token}.out"
        words = ["submit", str(self.folder / f"{token}.yaml"), "--key", token, "-o", "json"]
        if self.chance.random() < 0.5:
            words += ["--server", f"http://127.0.0.1:{self.port}"]
        else:
            words += ["--home", str(self.home.folder), "--store", self.url]
        os.environ[TOKEN_VARIABLE] = self.secret
        process = forked(lambda: app(words, prog_name="chorus", obj=real_parts()), out)
        self.commands += 1
        lives = self.chance.uniform(0, LONGEST_SUBMIT) if self.chance.random() < KILLED_COMMANDS else 1e9
        self.clients.append(Client(token, process, out, now + lives))

    def hear(self, now: float) -> None:
        for client in list(self.clients):
            if now >= client.dies_at:
                os.kill(client.process, signal.SIGKILL)
            code = ended(client.process)
            if code is None:
                continue
            self.clients.remove(client)
            if code == 0:
                run = json.loads(client.out.read_text())["id"]
                self.acknowledged.setdefault(client.token, set()).add(run)
                if self.chance.random() < AGAIN:
                    self.waiting.insert(0, client.token)
                continue
            if code == -signal.SIGKILL:
                self.kills["submit"] += 1
            else:
                self.refused[code] += 1
            self.waiting.append(client.token)

    def tend_controller(self, now: float) -> None:
        if self.controller is not None and now >= self.controller_dies_at:
            os.kill(self.controller, signal.SIGKILL)
        if self.controller is not None and (code := ended(self.controller)) is not None:
            self.kills["controller" if code == -signal.SIGKILL else f"controller ended with {code}"] += 1
            self.controller = None
        if self.controller is None:
            here = ClusterChoice(local=True)
            out = self.folder / "controller.out"
            self.controller = forked(lambda: serve(real_parts(), self.home, here, console()), out)
            self.controller_dies_at = now + self.chance.uniform(*self.lives)

    def tend_api(self, now: float) -> None:
        if self.api is not None and now >= self.api_dies_at:
            os.kill(self.api, signal.SIGKILL)
        if self.api is not None and (code := ended(self.api)) is not None:
            self.kills["api" if code == -signal.SIGKILL else f"api ended with {code}"] += 1
            self.api = None
        if self.api is None:
            out = self.folder / "api.out"
            self.api = forked(lambda: api(real_parts(), self.home, "127.0.0.1", self.port, console()), out)
            self.api_dies_at = now + self.chance.uniform(*API_LIVES)

    def end_api(self) -> None:
        if self.api is not None:
            with suppress(ProcessLookupError):
                os.kill(self.api, signal.SIGKILL)
            os.waitpid(self.api, 0)
            self.kills["api"] += 1
            self.api = None

    def end_controller(self) -> None:
        if self.controller is not None:
            with suppress(ProcessLookupError):
                os.kill(self.controller, signal.SIGKILL)
            os.waitpid(self.controller, 0)
            self.kills["controller"] += 1
            self.controller = None

    # ---- what is left ----

    def found(self) -> dict[str, Any]:
        """Counts of what the store and the registry hold that they should not, and of what was done."""
        with closing(Store(self.url)) as store:
            runs, jobs = store.runs(), store.jobs()
            events = {job.id: store.events(job.id) for job in jobs}
        told = {run for ids in self.acknowledged.values() for run in ids}
        stored = [run.id for run in runs]
        return {
            "acknowledged": len(self.acknowledged),
            "lost": len(told - set(stored)) + self.count - len(self.acknowledged),
            "doubled": len(stored)
            - len(set(self.acknowledged))
            + sum(len(ids) - 1 for ids in self.acknowledged.values())
            + len(jobs)
            - len(stored),
            "broken histories": sum(not whole(list(history)) for history in events.values()),
            "cancelled": sum(job.status is Status.CANCELLED for job in jobs),
            "succeeded": [job for job in jobs if job.status is Status.SUCCEEDED],
            "failed": [f"{job.reason}: {job.message}" for job in jobs if job.status is Status.FAILED],
            "attempts": sum(job.attempt for job in jobs),
        }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def whole(history: list[Any]) -> bool:
    """Submitted once, and every later event begins where the one before it ended."""
    statuses = [None, *(event.after for event in history)]
    began = [event.before for event in history]
    return began == statuses[:-1] and began.count(None) == 1


def recipe(number: int) -> dict[str, Any]:
    return {
        "version": 1,
        "name": f"job-{number:04d}",
        "task": "finance-sentiment",
        "base_model": "bases/tiny.yaml",
        "datasets": [{"path": "data", "type": "classification", "labels": LABELS}],
        "sequence_len": 64,
        "global_batch_size": 4,
        "max_steps": 2,
        "lora_r": 2,
        "seed": number,
        "registry": {"name": f"tiny.chaos-{number:04d}"},
    }


def case(folder: Path, small: bool, seed: int) -> Outcome:
    count, store_every, share = (16, 6, 2) if small else (1000, 33, 100)
    wanted, of_each = (1, 0) if small else (200, 10)
    server = Postgres()  # with its real settings: what it acknowledged must outlive it
    began = time.monotonic()
    try:
        chaos = Chaos(folder, server, random.Random(seed), count, wanted, of_each)
        with tracking_server.start(chaos.home.folder) as tracking:
            chaos.run(store_every)
            with closing(Store(chaos.url)) as store:
                meanwhile = chaos.count_of(store, Status.SUCCEEDED)
            chaos.finish(share)
            found = chaos.found()
            versions = MlflowRegistry(tracking.url).versions()
    finally:
        server.close()
    steps = Counter(version.tags["chorus.step_id"] for version in versions)
    unregistered = [
        job
        for job in found["succeeded"]
        if f"tiny.chaos-{job.name[4:]}" not in {version.name for version in versions}
    ]
    done, kills = len(found["succeeded"]), sum(chaos.kills.values())
    return Outcome(
        "chaos-submissions",
        f"{count:,} submissions under {kills} SIGKILLs",
        [
            Table("What was killed", ("what", "times"), sorted(chaos.kills.items())),
            Table(
                "What was found afterwards",
                ("what", "how many"),
                [
                    ("commands given", chaos.commands),
                    ("of them neither killed nor acknowledged, by exit code", dict(chaos.refused)),
                    ("submissions acknowledged", found["acknowledged"]),
                    ("jobs succeeded between the kills", meanwhile),
                    ("jobs succeeded in the end", done),
                    ("jobs cancelled in the end", found["cancelled"]),
                    ("jobs failed, by reason", dict(Counter(found["failed"]))),
                    ("attempts begun", found["attempts"]),
                    ("versions registered", len(versions)),
                ],
            ),
        ],
        [
            Target("SIGKILLs", kills, wanted),
            *(Target(f"SIGKILLs of {name}", chaos.kills[name], of_each) for name in KILLED),
            Target("jobs succeeded between the kills", meanwhile, 0 if small else 1),
            Target("jobs succeeded in the end", done, share),
            Target(
                "jobs neither succeeded nor cancelled", count - done - found["cancelled"], 0, at_least=False
            ),
            Target("submissions lost", found["lost"], 0, at_least=False),
            Target("submissions doubled", found["doubled"], 0, at_least=False),
            Target("jobs with a broken history of statuses", found["broken histories"], 0, at_least=False),
            Target("jobs succeeded without a version", len(unregistered), 0, at_least=False),
            Target("versions registered twice", sum(steps.values()) - len(steps), 0, at_least=False),
        ],
        Bars({name: float(times) for name, times in sorted(chaos.kills.items())}, "SIGKILLs"),
        [f"It took {time.monotonic() - began:.0f} s; seed {seed}."],
    )
