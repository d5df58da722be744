"""The short way of what is asked most: to create a recovery, and to read one.

FastAPI finds a route and solves its parameters in general, at more CPU time than what these two do. Without
a query, their parameters are a path and one header; they are read here and handed to the same handlers. The
routes of `recoveries.py` answer all else (`?dry_run=`, `?wait=`), and are the documented ones.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from recoup.schemas import CreateRecovery
from recoup_api import recoveries
from recoup_api.body import body_of
from recoup_api.jobs import answer_with
from recoup_api.wiring import for_jobs

LONGEST_HEADER = 255
"""What is longer, FastAPI judges."""
HEADERS = frozenset({b"if-none-match", b"idempotency-key"})

_admit = for_jobs("recovery")
_body = body_of(CreateRecovery)


class Straight(Route):
    """Serves what it can serve in full; everything else is as if it were not there."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] not in (self.methods or ()) or not _is_plain(scope):
            return Match.NONE, {}
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def _is_plain(scope: Scope) -> bool:
    lengths = (len(value) for name, value in scope["headers"] if name in HEADERS)
    return not scope["query_string"] and all(length <= LONGEST_HEADER for length in lengths)


async def _create(request: Request) -> Response:
    await _admit(request)
    body = await _body(request)
    return await recoveries.create(request, body, idempotency_key=request.headers.get("idempotency-key"))


async def _read(request: Request) -> Response:
    await _admit(request)
    return await answer_with(recoveries.RECOVERY, request, 0, request.headers.get("if-none-match", ""))


ROUTES = (
    Straight(recoveries.PATH, _create, methods=["POST"]),
    Straight(f"{recoveries.PATH}/{{id}}", _read, methods=["GET"]),
)
