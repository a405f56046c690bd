"""The connection to the tracking server: MLflow's settings, its errors in our words, its limits.

Owns how `mlflow` is imported. Only `promotion` and the `mlflow_*` files beside it import it, and no command
imports any of them before it needs the server: `import mlflow` takes seconds.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# MLflow reads these when imported (telemetry) or at each request. A server that is gone must be noticed
# within seconds, not after the two minutes a request and the seven retries that are its defaults.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
for _key, _value in SETTINGS.items():
    os.environ.setdefault(_key, _value)

from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.credentials import (  # noqa: E402
    get_default_host_creds,  # pyright: ignore[reportUnknownVariableType]
)
from mlflow.utils.rest_utils import http_request_safe  # noqa: E402  # pyright: ignore[reportUnknownVariableType]
from requests import RequestException  # noqa: E402

from orchestrator.contracts import RegistryUnreachable  # noqa: E402

# Their progress notes would break the live table of `chorus run`; what matters is raised.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100
"""Of one `log_batch` request."""
PAGE = 200


def connect(url: str) -> MlflowClient:
    """A client of the server at `url`; no request is made yet."""
    return MlflowClient(tracking_uri=url, registry_uri=url)


def server_of(client: MlflowClient) -> str:
    """The address `client` was connected to."""
    return str(client.tracking_uri)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def post(client: MlflowClient, endpoint: str, body: Mapping[str, Any]) -> None:
    """A request of MLflow's REST interface, with the credentials, time limits and errors of the client's."""
    credentials: Any = get_default_host_creds(server_of(client))
    http_request_safe(credentials, f"/api/2.0/mlflow/{endpoint}", "POST", json=body)


@contextmanager
def reaching(url: str) -> Generator[None]:
    """Turn "the server does not answer", in MLflow's several forms, into RegistryUnreachable."""
    try:
        yield
    except (MlflowException, RequestException) as error:
        if not _is_unanswered(error):
            raise
        raise RegistryUnreachable(
            f"the MLflow server at {url} does not answer: {_first_line(error)}"
        ) from error


def _is_unanswered(error: BaseException) -> bool:
    """No answer, or one that says to come back later: MLflow hides the HTTP error in `__context__`."""
    causes = (error, error.__cause__, error.__context__)
    transport = next((cause for cause in causes if isinstance(cause, RequestException)), None)
    if transport is not None:
        return transport.response is None or transport.response.status_code >= 500
    return isinstance(error, MlflowException) and error.error_code == "TEMPORARILY_UNAVAILABLE"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def is_absent(error: MlflowException) -> bool:
    """Whether the server answered that a thing does not exist."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def exists_already(error: MlflowException) -> bool:
    return error.error_code in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")


def added_by_another(error: MlflowException) -> bool:
    """Whether a row that the server was to add had just been added: in SQLite's words, or PostgreSQL's."""
    return any(words in str(error) for words in ("UNIQUE constraint failed", "duplicate key value"))


def pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Every result of one of the client's paged searches."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def quoted(text: str) -> str:
    """`text` as a string of MLflow's filter language, which knows no escape: other quotes are refused."""
    if "'" in text:
        raise ValueError(f"{text!r} holds a quote, which MLflow cannot search for")
    return f"'{text}'"


def metric_key(*parts: str) -> str:
    """`<task>/<metric>` in the characters MLflow allows; `hit@1` becomes `hit_at_1`, as in its own names."""
    key = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return re.sub(r"[^/\w.\- :]", "_", key.replace("@", "_at_"))


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name, created if absent, brought back if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return _create_experiment(client, name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _create_experiment(client: MlflowClient, name: str) -> str:
    try:
        # Without the tag MLflow's pages take us for an agent under development and hide the training runs.
        return client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if found is None or not exists_already(error):
            raise
        return str(found.experiment_id)
