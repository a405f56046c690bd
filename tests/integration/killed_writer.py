"""`python -m tests.integration.killed_writer URL FOLDER VERB`: do VERB over and over, killed at each request.

Forks once per request that VERB sends; the n-th child is killed with SIGKILL when its n-th writing request is
on the wire and unanswered. Prints one JSON line: the registered name each child worked under.
"""

import http.client
import json
import os
import signal
import sys
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 (once before the forks, not in each child)

from orchestrator.registry.registry import MlflowRegistry
from tests.contract.samples import fresh_name, new_version

MOST = 60


def die_at_request(number: int) -> None:
    """Kill this process at its `number`-th writing request, sent but not answered."""
    answer, sent = http.client.HTTPConnection.getresponse, iter(range(1, MOST))

    def getresponse(connection):
        if connection.writing and next(sent) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(connection)

    begin = http.client.HTTPConnection.putrequest

    def putrequest(connection, method, *rest, **named):
        connection.writing = method != "GET"
        return begin(connection, method, *rest, **named)

    http.client.HTTPConnection.getresponse = getresponse
    http.client.HTTPConnection.putrequest = putrequest


def register(registry, folder, name, kill_at):
    new = new_version(registry, folder, name)
    die_at_request(kill_at)
    registry.register(new)


def promote(registry, folder, name, kill_at):
    prepare(registry, folder, name)
    die_at_request(kill_at)
    registry.promote(name, 2, 1, "better", {"macro_f1": 0.9})


def rollback(registry, folder, name, kill_at):
    prepare(registry, folder, name)
    registry.promote(name, 2, 1, "better", {"macro_f1": 0.9})
    die_at_request(kill_at)
    registry.rollback(name, 2, "worse")


def prepare(registry, folder, name):
    for seed in (1, 2):
        registry.register(new_version(registry, folder, name, f"step-{seed}", seed, scores=[]))
    registry.promote(name, 1, None, "first", {})


def main(url: str, folder: Path, verb: str) -> None:
    names = []
    for kill_at in range(1, MOST):
        names.append(fresh_name())
        child = os.fork()
        if child == 0:
            globals()[verb](MlflowRegistry(url), folder / str(kill_at), names[-1], kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            assert status == 0, status
            break
    print(json.dumps(names))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
