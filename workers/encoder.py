"""The process beside a host that turns rows into tokens, and rank 0's hold on it.

Rendering and tokenizing are Python that would hold up the tick, in a thread as much as in the tick itself. So
one process does it, started with the first job that needs it and gone with its rank:

    python -m workers.encoder BASE

It reads one request a line and answers each in a line, in order; the tokens go into a file. It does without
torch, which would double its start and take four times its memory.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.disk import Problem, written
from workers.encoded import Source, cannot_start, encode, sources, write
from workers.types import BadInput, DatasetSpec, JobSpec

log = logging.getLogger(__name__)


class Encoder:
    """The process, as rank 0 sees it. One thread asks; another may cancel."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._process: subprocess.Popen[str] | None = None
        self._serving: Path | None = None
        self._cancelled: set[Path] = set()
        self._lock = threading.Lock()

    def encode(self, spec: JobSpec, out: Path) -> Problem | None:
        """Returns when the job's rows are in `out`, with what kept them from it. Starts the process."""
        with self._lock:
            if out in self._cancelled:
                return "internal_error", "cancelled"
            self._serving = out
            if self._process is not None and self._process.poll() is not None:
                self._end()  # it died while it had nothing to do
            self._process = self._process or _started(self._base)
            process = self._process
        line = _ask(process, _request(spec, out))
        with self._lock:
            self._serving = None
            if line.endswith("\n"):
                if out in self._cancelled:
                    self._end()  # killed, though it was done: no job after this one is to ask it
                problem = json.loads(line)
                return tuple(problem) if problem else None
            status = self._end()
        return "internal_error", f"the process that encodes rows ended ({status}) at this job's"

    def cancel(self, out: Path) -> None:
        """End the process if it is at `out`, and do not begin with it; the next request starts another."""
        with self._lock:
            self._cancelled.add(out)
            if self._serving == out and self._process is not None:
                self._process.kill()  # whoever waits for its answer hears of it

    def close(self) -> None:
        """With nothing under way."""
        with self._lock:
            self._end()

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with suppress(OSError), process:  # closes the pipes; what it has not read is lost
            process.wait()
        return process.returncode


def _ask(process: subprocess.Popen[str], request: str) -> str:
    """The answer's line; less than one if the process ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def _started(base: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "workers.encoder", base],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
    )


def _request(spec: JobSpec, out: Path) -> str:
    of = [[[asdict(data) for data in datasets] for datasets in source] for source in sources(spec)]
    return json.dumps({"out": str(out), "sequence_len": spec.training.sequence_len, "sources": of})


# ---- the process ------------------------------------------------------------------------------------------


def serve(tokenizer: Any) -> None:
    """Answer requests until the rank closes them; one that is under way then is given up."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        print(json.dumps(answer(tokenizer, json.loads(requests.get()))), flush=True)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def answer(tokenizer: Any, request: dict[str, Any]) -> Problem | None:
    """Encode what a request names; what went wrong."""
    try:
        courses = encode(tokenizer, _sources(request), request["sequence_len"])
    except (BadInput, OSError) as error:
        return "bad_data", str(error) or type(error).__name__
    except MemoryError:
        return "out_of_memory", "its rows do not fit in memory; use fewer or shorter ones"
    except Exception as error:
        log.exception("%s cannot be encoded", request["out"])
        return "bad_data", str(cannot_start(error))
    return written(lambda: write(Path(request["out"]), courses))


def _sources(request: dict[str, Any]) -> Sequence[Source]:
    def datasets(given: list[dict[str, Any]]) -> tuple[DatasetSpec, ...]:
        return tuple(DatasetSpec(**{**data, "labels": tuple(data["labels"])}) for data in given)

    return [(datasets(train), datasets(validation)) for train, validation in request["sources"]]


def main(base: str) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers then does without it
    from transformers import AutoTokenizer

    serve(AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(sys.argv[1])
