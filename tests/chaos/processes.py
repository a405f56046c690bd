"""Processes that are there to be killed: forked from one that has imported everything, so that each is cheap.

A forked child is a real process, and what it runs is the real command; only the seconds of importing are
saved. The parent must have no threads when it forks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], int | None], out: Path | None = None) -> int:
    """The id of a process that does `work` and ends with its number; it speaks to `out` and beside it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        if out is not None:
            for number, path in ((1, out), (2, out.with_suffix(".err"))):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """Its exit status, negative for a signal; None while it runs. Asks once: an ended child is gone."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def killed_when(child: int, due: Callable[[], bool]) -> bool:
    """Let it live until then; whether SIGKILL ended it. One that failed of itself raises."""
    while not due():
        code = ended(child)
        if code is not None:
            assert code == 0, f"the child ended with {code}"
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code != 0


def killed_after(child: int, seconds: float) -> bool:
    """The same, after so many seconds."""
    deadline = time.monotonic() + seconds
    return killed_when(child, lambda: time.monotonic() >= deadline)
