"""`chorus api`: a `Service` over HTTP, for those who do not share the home. FastAPI; `/docs` shows its pages.

Every request but `GET /v1/health` carries `Authorization: Bearer TOKEN`; the token's name stands in the
events of what it changes. An error is `{"code": EXIT_CODE, "message": SENTENCE}`, as the command would have
ended. A recipe is named by its path on the server, for base and data are read there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict

from orchestrator.api import errors
from orchestrator.api.changes import priority_of
from orchestrator.api.service import HomeService, Value
from orchestrator.store.rows import RequestKind
from workers.types import BadInput

STATUS = {
    errors.USAGE: 422,
    errors.REFUSED: 409,
    errors.NOT_FOUND: 404,
    errors.UNREACHABLE: 503,
    errors.INTERNAL: 500,
}
"""Exit code of a command -> status of its answer."""
log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1")


@dataclass(frozen=True)
class Desk:
    """What the routes need to know."""

    service: Callable[[str], HomeService]
    """The service in somebody's name."""
    holder: Callable[[str], str | None]
    """Whose a token is; None for nobody's."""


class Unknown(Exception):
    """Nobody's token."""


class Submission(BaseModel):
    """A recipe or pipeline to be trained."""

    model_config = ConfigDict(extra="forbid")
    file: str
    """Absolute path on the server."""
    key: str | None = None
    """The submitter's own: a second submission under it is the first one."""


class Change(BaseModel):
    """What is asked of a job, or of all jobs of a run."""

    model_config = ConfigDict(extra="forbid")
    kind: RequestKind
    value: str | int | None = None
    """Of `priority`: `low`, `normal`, `high`, or 0 to 100."""


def make_app(desk: Desk) -> FastAPI:
    app = FastAPI(title="Chorus", version="1")
    app.state.desk = desk
    app.include_router(router)
    app.add_exception_handler(Unknown, unknown)
    app.add_exception_handler(RequestValidationError, malformed)
    for kind in (*(kind for kind, _ in errors.kinds() if issubclass(kind, Exception)), OSError, Exception):
        app.add_exception_handler(kind, failed)
    return app


# ---- who asks -------------------------------------------------------------------------------------------


def caller(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> HomeService:
    """Raises Unknown."""
    desk: Desk = request.app.state.desk
    who = desk.holder(given.credentials) if given else None
    if who is None:
        raise Unknown
    return desk.service(who)


Caller = Annotated[HomeService, Depends(caller)]

# ---- to look --------------------------------------------------------------------------------------------


@router.get("/health")
def health() -> Value:
    return {"service": "chorus"}


@router.get("")
def root(caller: Caller) -> Value:
    return {"home": caller.place, "at_work": caller.at_work()}


@router.get("/jobs")
def jobs(caller: Caller, everything: bool = False) -> list[Value]:
    return caller.jobs(everything)


@router.get("/jobs/{reference}")
def status(caller: Caller, reference: str) -> Value:
    return caller.status(reference)


@router.get("/jobs/{reference}/lines")
def lines(caller: Caller, reference: str, event: int = 0, step: int = -1) -> Value:
    return caller.lines(reference, (event, step))


@router.get("/jobs/{reference}/events")
def events(caller: Caller, reference: str) -> list[Value]:
    return caller.events(reference)


@router.get("/jobs/{reference}/explanation")
def explanation(caller: Caller, reference: str) -> Value:
    return caller.explain(reference)


@router.get("/hosts")
def hosts(caller: Caller) -> Value:
    return caller.hosts()


@router.get("/teams")
def teams(caller: Caller) -> list[Value]:
    return caller.teams()


# ---- to change ------------------------------------------------------------------------------------------


@router.post("/runs")
def submit(caller: Caller, submission: Submission) -> Value:
    file = Path(submission.file)
    if not file.is_absolute():
        raise BadInput(f"file: {submission.file} is not an absolute path; write where it lies on the server")
    return caller.submit(file, submission.key)


@router.post("/jobs/{reference}/changes")
def change(caller: Caller, reference: str, change: Change) -> Value:
    value = priority_of(str(change.value)) if change.kind == "priority" else None
    return caller.change(reference, change.kind, value)


# ---- when it cannot be done -----------------------------------------------------------------------------


def unknown(_request: Request, _error: Exception) -> JSONResponse:
    words = "no valid token came with the request; `chorus token NAME` in the server's home makes one"
    body = {"code": errors.REFUSED, "message": words}
    return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})


def malformed(request: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with a request: where, and what."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return failed(request, BadInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))


def failed(_request: Request, error: Exception) -> JSONResponse:
    """A sentence; of an error that has none, a traceback in the server's log."""
    found = errors.explain(error)
    if found is None:
        log.error("a request failed", exc_info=error)
    code, sentence = found or (errors.INTERNAL, "an error inside chorus; the server's log has it")
    return JSONResponse({"code": code, "message": sentence}, STATUS[code])
