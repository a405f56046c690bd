"""Writers and promoters on one MLflow server that is killed under them.

Each writer registers its versions under all names in turn; two promoters fight over each name's champion: for
some names under the lock that commands of one home share, for the others without it, as on two machines. The
server is killed alone first, and its watcher starts it again; then with its watcher, as when a machine goes
down, and the next command does. Writers and promoters ask again what was not answered. `--postgres`, or an
address of yours in CHORUS_REGISTRY_STORE, puts MLflow's tables into PostgreSQL.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 (once before the forks, not in each child)
import psutil
from mlflow.tracking import MlflowClient

from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.processes import ended, forked
from tests.chaos.registry_checks import of_moves, of_versions
from tests.chaos.registry_children import LOCKED, MADE, PROMOTERS, TOLD, WRITERS, fight, told, write
from tests.postgres import Postgres

NAMES = (f"{LOCKED}-a.sentiment", "open-a.sentiment", f"{LOCKED}-b.sentiment", "open-b.sentiment")
KILL_AT = (1 / 3, 2 / 3)
"""Shares of all versions that are registered when the server is killed."""
POLL = 0.05


class Chaos:
    """The server, its children, and what was done to it."""

    def __init__(
        self, folder: Path, names: Sequence[str], writers: int, count: int, kills: int, seed: int
    ) -> None:
        self.home, self.told = folder / "home", folder / "told"
        self.told.mkdir(parents=True)
        self.names, self.writers, self.count, self.seed = names, writers, count, seed
        self.due = [int(share * writers * count) for share in KILL_AT[:kills]]
        self.away: list[float] = []
        """Seconds from each kill to the first answer."""
        self.killed = 0
        self.stop = folder / "stop"
        self.running: set[int] = set()
        """The children. They were forked with our hold on the server: it does not end before them."""

    def run(self) -> dict[str, list[str]]:
        """The problems found, by what must hold."""
        held = [tracking_server.start(self.home)]
        self.url = held[0].url
        try:
            writers = [self._forked(f"writer-{n}", self._write(n)) for n in range(self.writers)]
            promoters = [self._forked(f"promoter-{n}", self._fight(n)) for n in range(2)]
            for due in self.due:
                while self.registered() < due:
                    self._still_running(writers + promoters)
                held += self._kill(with_watcher=bool(self.away))
            self._all_end(writers)
            self.stop.touch()
            self._all_end(promoters)
            return self._problems()
        finally:
            for child in self.running:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            for server in held:
                server.stop()

    def registered(self) -> int:
        return sum(1 for _ in told(self.told, WRITERS))

    def _write(self, writer: int) -> Callable[[], None]:
        return partial(write, self.url, self.told, writer, self.names, self.count)

    def _fight(self, promoter: int) -> Callable[[], None]:
        lock, seed = self.told / "lock", self.seed + promoter
        return partial(fight, self.url, lock, self.told, promoter, self.names, seed, self.stop)

    def _forked(self, name: str, work: Callable[[], None]) -> int:
        child = forked(work, self.told / f"{name}.out")
        self.running.add(child)
        return child

    def _ended(self, child: int) -> int | None:
        code = ended(child)
        if code is not None:
            self.running.remove(child)
        return code

    def _kill(self, with_watcher: bool) -> list[tracking_server.TrackingServer]:
        """SIGKILL; returns when a server answers again, with the hold of the command that started it."""
        began, doomed = time.monotonic(), self._serving(with_watcher)
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.killed += len(doomed)
        held = []
        if with_watcher:
            psutil.wait_procs(doomed)
            held = [tracking_server.start(self.home)]
            assert held[0].url == self.url, "the server has another address now"
        while not tracking_server.healthy(self.url):
            time.sleep(POLL)
        self.away.append(time.monotonic() - began)
        return held

    def _serving(self, with_watcher: bool) -> list[psutil.Process]:
        """The server's processes, all started by us, and of a machine that goes down its watcher too."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if "registry.watch" in words and with_watcher:
                    found.insert(0, process)  # first: it would start another
                elif "mlflow" in words and "registry.watch" not in words:
                    found.append(process)
        assert found, "no server to kill"
        return found

    def _still_running(self, children: Sequence[int]) -> None:
        for child in children:
            assert self._ended(child) is None, self._errors()
        time.sleep(POLL)

    def _all_end(self, children: Sequence[int]) -> None:
        left = list(children)
        while left:
            codes = {child: self._ended(child) for child in left}
            assert all(code in (None, 0) for code in codes.values()), self._errors()
            left = [child for child, code in codes.items() if code is None]
            time.sleep(POLL)

    def _errors(self) -> str:
        return "\n".join(text for file in sorted(self.told.glob("*.err")) if (text := file.read_text()))

    def _problems(self) -> dict[str, list[str]]:
        registry, client = MlflowRegistry(self.url), MlflowClient(self.url, self.url)
        wanted = {
            (self.names[(writer + place) % len(self.names)], f"w{writer}-{place}")
            for writer in range(self.writers)
            for place in range(self.count)
        }
        return {
            **of_versions(registry, client, self.home, self.told, wanted),
            **of_moves(registry, client, self.told, self.names),
        }


def case(folder: Path, small: bool, seed: int, times: int = 200, postgres: bool = False) -> Outcome:
    """`times`: versions of each writer."""
    with on_postgres() if postgres else nullcontext():
        return on_store(folder, small, seed, times)


@contextmanager
def on_postgres() -> Generator[None]:
    """MLflow's tables in a server of our own, with its real settings."""
    server = Postgres()
    os.environ[tracking_server.STORE_VARIABLE] = server.new_database()
    try:
        yield
    finally:
        del os.environ[tracking_server.STORE_VARIABLE]
        server.close()


def on_store(folder: Path, small: bool, seed: int, times: int) -> Outcome:
    writers, count, kills = (2, 4, 1) if small else (8, times, 2)
    names = NAMES[:2] if small else NAMES
    began = time.monotonic()
    chaos = Chaos(folder, names, writers, count, kills, seed)
    problems = chaos.run()
    written, tried = list(told(chaos.told, WRITERS)), list(told(chaos.told, PROMOTERS))
    outcomes = Counter(f"{line['kind']}: {line['outcome']}" for line in tried)
    seconds = sorted(line["seconds"] for line in written)
    store = "SQLite" if tracking_server.store_words() == "sqlite" else "PostgreSQL"
    return Outcome(
        f"chaos-registry-{store.lower()}",
        f"{writers} writers, {count} versions each, two promoters, {kills} kills of the server, on {store}",
        [
            Table(
                "What was done",
                ("what", "how often"),
                [
                    ("versions registered", len(written)),
                    ("of them not answered at first", sum(line["unanswered"] > 0 for line in written)),
                    ("kills of the server (processes)", f"{len(chaos.away)} ({chaos.killed})"),
                    ("seconds until it answered again", ", ".join(f"{away:.1f}" for away in chaos.away)),
                    *sorted(outcomes.items()),
                    ("moves not answered at first", sum(line["unanswered"] > 0 for line in tried)),
                ],
            ),
            Table(
                "Problems",
                ("what",),
                [(text,) for found in problems.values() for text in found] or [("none",)],
            ),
        ],
        [
            Target("versions registered", len(written), writers * count),
            Target("kills of the server", len(chaos.away), kills),
            Target(
                "moves made", sum(line["outcome"] == MADE for line in tried), max(1, writers * count // 16)
            ),
            Target(
                "moves told that the other was faster",
                sum(line["outcome"] == TOLD for line in tried),
                writers * count // 160,
            ),
            *(Target(what, len(found), 0, at_least=False) for what, found in problems.items()),
        ],
        Bars(
            {
                f"{share}% of registrations": seconds[share * (len(seconds) - 1) // 100]
                for share in (1, 50, 90, 99, 100)
            },
            "seconds at most",
        ),
        [f"It took {time.monotonic() - began:.0f} s; seed {seed}."],
    )
