"""A `Service` somewhere else: asks a `chorus api` over HTTP. Methods and what they give are in `service`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from orchestrator.api.service import NOTHING_SEEN, Seen, Value
from orchestrator.store.rows import RequestKind
from workers.types import BadInput

TIMEOUT = (5.0, 60.0)
"""Seconds to connect, and to wait for an answer: a submission reads its data."""
TOKEN_VARIABLE = "CHORUS_TOKEN"


class ServerAway(Exception):
    """The server does not answer, or answers what no `chorus api` says."""


class ServerSaid(Exception):
    """The server's own sentence, with the exit code that the command would have had there."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class RemoteService:
    """Raises ServerAway, ServerSaid; BadInput for an address that is none."""

    def __init__(self, url: str, token: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"--server {url} is no address; write http://HOST:PORT or https://HOST")
        if not token:
            raise BadInput(
                f"{TOKEN_VARIABLE} is not set: put the token there that `chorus token NAME` made for you"
            )
        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"

    @property
    def place(self) -> str:
        return self._url

    @property
    def flag(self) -> str:
        return f" --server {self._url}"

    @property
    def folder_flag(self) -> None:
        return None

    def at_work(self) -> bool:
        return self._get("")["at_work"]

    def jobs(self, everything: bool) -> list[Value]:
        return self._get("/jobs", everything=everything)

    def status(self, reference: str) -> Value:
        return self._get(f"/jobs/{reference}")

    def lines(self, job: str, seen: Seen = NOTHING_SEEN) -> Value:
        return self._get(f"/jobs/{job}/lines", event=seen[0], step=seen[1])

    def events(self, job: str) -> list[Value]:
        return self._get(f"/jobs/{job}/events")

    def explain(self, job: str) -> Value:
        return self._get(f"/jobs/{job}/explanation")

    def hosts(self) -> Value:
        return self._get("/hosts")

    def teams(self) -> list[Value]:
        return self._get("/teams")

    def submit(self, file: Path, key: str | None) -> Value:
        """`file` is taken as it lies here: the server must see it under the same absolute path."""
        return self._ask("POST", "/runs", json={"file": str(file.absolute()), "key": key})

    def change(self, reference: str, kind: RequestKind, value: Any = None) -> Value:
        return self._ask("POST", f"/jobs/{reference}/changes", json={"kind": kind, "value": value})

    def _get(self, path: str, **query: Any) -> Any:
        return self._ask("GET", path, params=query)

    def _ask(self, verb: str, path: str, **more: Any) -> Any:
        try:
            response = self._session.request(verb, f"{self._url}/v1{path}", timeout=TIMEOUT, **more)
            value = response.json()
        except requests.RequestException as error:
            raise ServerAway(
                f"{self._url} does not answer as a `chorus api` ({type(error).__name__})"
            ) from error
        if response.ok:
            return value
        if isinstance(value, dict) and {"code", "message"} <= value.keys():  # pyright: ignore[reportUnknownMemberType]
            raise ServerSaid(int(value["code"]), str(value["message"]))  # pyright: ignore[reportUnknownArgumentType]
        raise ServerAway(f"{self._url} answers {response.status_code}, which no `chorus api` does here")
