"""S3 over HTTP on this machine: moto's server, which can go away and comes back with all that it held."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class S3:
    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._gone = False
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would tell of every request
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.settings = {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}"}

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        if self._gone:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("503 Service Unavailable", [])
            return []
        return self._app(environ, start_response)

    @contextmanager
    def away(self) -> Generator[None]:
        """Every connection breaks off meanwhile."""
        self._gone = True
        try:
            yield
        finally:
            self._gone = False

    def bucket(self) -> str:
        """A new one."""
        name = f"chorus-{uuid4().hex[:12]}"
        fsspec.filesystem("s3").mkdir(name)
        return name

    def close(self) -> None:
        self._server.shutdown()
