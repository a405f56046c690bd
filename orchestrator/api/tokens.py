"""Who may speak to `chorus api`: a name a token. Tokens are told once; the file keeps their SHA-256."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from pathlib import Path

from workers.types import BadInput

FILE = "api-tokens.json"
_NAME = re.compile(r"[\w.@+-]{1,80}")


def grant(home: Path, name: str) -> str:
    """A new token of `name`; one it had before holds no more. Raises BadInput for a name that is none."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name for a token: 1 to 80 letters, digits and _ . @ + -")
    home.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(32)
    with (home / f"{FILE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(home / FILE, _read(home) | {name: _digest(token)})
    return token


def holder(home: Path, token: str) -> str | None:
    """Whose token it is; None for nobody's."""
    digest = _digest(token)
    names = [name for name, known in _read(home).items() if hmac.compare_digest(known, digest)]
    return names[0] if names else None


def any_granted(home: Path) -> bool:
    return bool(_read(home))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _read(home: Path) -> dict[str, str]:
    try:
        return json.loads((home / FILE).read_text())
    except FileNotFoundError:
        return {}


def _write(path: Path, tokens: dict[str, str]) -> None:
    """Whole or not at all; for nobody else to read."""
    aside = path.with_suffix(".new")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(tokens, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
