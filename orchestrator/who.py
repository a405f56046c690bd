"""Who runs this process: what stands in events, release records and the list of controllers."""

from __future__ import annotations

import getpass
import os
import socket


def user() -> str:
    """A name; one whose process has none in the user table, as in some containers, goes by its number."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def user_at_machine() -> str:
    return f"{user()}@{socket.gethostname()}"
