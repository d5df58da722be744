"""The outermost layer: every request is counted and timed, and is a span of its trace.

Requests are counted by the template of their route (`/v1/recoveries/{id}`): what clients make up, they
cannot make into a label. The time runs to the head of the answer; how long a stream of events is read says
nothing of the service.
"""

import time
from functools import cache

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recoup_jobs import tracing
from recoup_jobs.metrics import HTTP_REQUESTS, HTTP_SECONDS

METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"})
UNNAMED = "other"
"""A route or method that the service does not have, and requests that the door refused."""


class Observing:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500
        method = scope["method"] if scope["method"] in METHODS else UNNAMED

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _seconds(method, _route(scope)).observe(time.perf_counter() - began)
            await send(message)

        parent = Headers(scope=scope).get("traceparent")
        with tracing.span(f"{method} request", parent):
            try:
                await self._app(scope, receive, send_watched)
            finally:
                _requests(method, _route(scope), status).inc()


# Labels take values from fixed lists, so there are no more of these than routes, methods and statuses.


@cache
def _seconds(method: str, route: str) -> Histogram:
    return HTTP_SECONDS.labels(method, route)


@cache
def _requests(method: str, route: str, status: int) -> Counter:
    return HTTP_REQUESTS.labels(method, route, str(status))


def _route(scope: Scope) -> str:
    """The router leaves the route that it found in the scope."""
    return str(getattr(scope.get("route"), "path", UNNAMED))
