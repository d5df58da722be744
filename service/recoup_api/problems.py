"""Every error becomes an answer here, and nowhere else: `application/problem+json` (RFC 9457).

`HANDLERS` is the table. What a client sent is never echoed; what went wrong inside is
never told, only the request id under which the log has it.
"""

import errno
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Route

from recoup.schemas import Problem, ProblemItem
from recoup_jobs.errors import RecoupError, Unavailable, Unprocessable
from recoup_jobs.findings import pointer
from recoup_jobs.scrubber import scrub

HEADERS_BY_STATUS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
OPENAI_PATHS = ("/v1/files", "/v1/fine_tuning", "/v1/models", "/v1/chat/completions", "/v1/completions")
DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

log = logging.getLogger(__name__)


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    app.state.routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)


def answer(error: RecoupError, request_id: str, path: str) -> JSONResponse:
    items = error.items if isinstance(error, Unprocessable) else ()
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    return _problem(error.status, error.code, error.message, request_id, path, items, headers)


def _problem(
    status: int,
    code: str,
    detail: str,
    request_id: str,
    path: str,
    items: Sequence[ProblemItem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        type=f"urn:recoup:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=scrub(detail),
        code=code,
        request_id=request_id,
        errors=[item.model_copy(update={"message": scrub(item.message)}) for item in items],
    )
    sent = {"x-request-id": request_id} | HEADERS_BY_STATUS.get(status, {}) | dict(headers or {})
    content = problem.model_dump()
    if path.startswith(OPENAI_PATHS):
        content["error"] = _openai_error(problem)
    return JSONResponse(content, status, sent, media_type="application/problem+json")


def _openai_error(problem: Problem) -> dict[str, Any]:
    """The same, in the words of OpenAI's API, as a member of its own."""
    param = problem.errors[0].pointer.lstrip("/").replace("/", ".") if problem.errors else None
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    return {"message": problem.detail, "type": kind, "param": param, "code": problem.code}


def _refused(request: Request, error: Any) -> JSONResponse:
    return answer(error, request.state.request_id, request.url.path)


def _invalid_parameters(request: Request, error: Any) -> JSONResponse:
    items = [_parameter_item(detail) for detail in error.errors()]
    detail = f"{items[0].pointer}: {items[0].message}"
    return _problem(422, "invalid_value", detail, request.state.request_id, request.url.path, items)


def _http(request: Request, error: Any) -> JSONResponse:
    """Starlette's own: an unknown path, a method that a path does not have, a body that is too large."""
    status = HTTPStatus(error.status_code)
    code = "body_too_large" if status == 413 else status.phrase.lower().replace(" ", "_")
    detail = f"{request.method} is not possible here: {status.description or status.phrase}"
    headers = {"Allow": ", ".join(_allowed(request))} if status == 405 else error.headers
    return _problem(status, code, detail, request.state.request_id, request.url.path, headers=headers)


def _allowed(request: Request) -> list[str]:
    """The methods of every route of this path; who may GET may ask for the HEAD alone."""
    path = request.scope["path"]
    routes: list[Route] = request.app.state.routes
    methods = {m for route in routes if route.path_regex.match(path) for m in route.methods or ()}
    return sorted(methods | ({"HEAD"} & {m.replace("GET", "HEAD") for m in methods}))


def _database_away(request: Request, error: Any) -> JSONResponse:
    log.warning("the database did not answer request %s: %s", request.state.request_id, error)
    away = Unavailable("database_unavailable", "the ledger cannot be reached now; try again")
    return answer(away, request.state.request_id, request.url.path)


def _disk(request: Request, error: Any) -> JSONResponse:
    if error.errno not in DISK_IS_FULL:
        raise error
    detail = "the server's disk is full"
    return _problem(507, "storage_full", detail, request.state.request_id, request.url.path)


def _unforeseen(request: Request, _: Any) -> JSONResponse:
    detail = "an error that nobody foresaw; the server's log has it under this request id"
    return _problem(500, "internal_error", detail, request.state.request_id, request.url.path)


def _parameter_item(detail: dict[str, Any]) -> ProblemItem:
    loc = detail["loc"][1:] if detail["loc"][0] == "body" else detail["loc"]
    return ProblemItem(pointer=pointer(loc), code="invalid_value", message=detail["msg"])


HANDLERS: dict[type[Exception], Any] = {
    RecoupError: _refused,
    RequestValidationError: _invalid_parameters,
    HTTPException: _http,
    OperationalError: _database_away,
    PoolTimeout: _database_away,
    OSError: _disk,
    Exception: _unforeseen,
}
