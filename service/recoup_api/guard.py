"""The door: every answer gets its request id, and nobody passes without the right to.

With a key in the settings or keys in the ledger, everything but probes and documentation asks for one.
Without any the service is for this machine alone, and a request must name it by a loopback name: that
is what stops a web page from reaching it through a name of its own that resolves to
127.0.0.1 (DNS rebinding).
"""

import re
import secrets
from ipaddress import ip_address

import structlog
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recoup_api.limit import require_countable_body, require_small_headers
from recoup_api.problems import answer
from recoup_api.rates import Rates
from recoup_api.threads import in_thread
from recoup_jobs.errors import BadRequest, RecoupError, Unavailable
from recoup_jobs.keys import VISITOR, Caller, Keyring

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
NOBODY = Caller("", frozenset(), None)
OUTAGES = (OperationalError, PoolTimeout)
SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Keyring, rates: Rates) -> None:
        self._app = app
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        also: list[tuple[bytes, bytes]] = []
        structlog.contextvars.bind_contextvars(request_id=request_id)
        bodiless = scope["method"] == "HEAD"
        if bodiless:  # what GET would answer, but for the body
            scope = {**scope, "method": "GET"}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS, *also]
                names = {name for name, _ in own}
                message["headers"] = [*(h for h in message["headers"] if h[0] not in names), *own]
                await send(message)
                if bodiless:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif not bodiless:
                await send(message)

        try:
            require_small_headers(scope)
            require_countable_body(headers)
            caller = await self._admit(scope["path"], headers, also)
        except RecoupError as refusal:
            return await answer(refusal, request_id, scope["path"])(scope, receive, send_named)
        except OUTAGES:
            away = Unavailable("database_unavailable", "the ledger cannot be reached now; try again")
            return await answer(away, request_id, scope["path"])(scope, receive, send_named)
        scope.setdefault("state", {}).update(request_id=request_id, caller=caller)
        return await self._app(scope, receive, send_named)

    async def _admit(self, path: str, headers: Headers, also: list[tuple[bytes, bytes]]) -> Caller:
        """Who calls; where its rate stands becomes headers of whatever the answer is."""
        if path in OPEN_PATHS:
            return NOBODY
        key = _key(headers.get("authorization", ""))
        caller = self._keys.remembered(key)
        if caller is None:
            caller = await in_thread(self._keys.admit, key)
        if caller is VISITOR:
            _require_loopback(headers.get("host", ""))
        else:
            try:
                self._rates.take(caller.key or caller.tenant)
            finally:
                also += self._rates.headers(caller.key or caller.tenant)
        return caller


def _request_id(offered: str) -> str:
    return offered if REQUEST_ID.fullmatch(offered) else f"req_{secrets.token_hex(12)}"


def _key(authorization: str) -> str | None:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _require_loopback(host: str) -> None:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name != "localhost" and not _is_loopback_address(name.strip("[]")):
        message = "without an API key this server answers to localhost and loopback addresses only"
        raise BadRequest("host_not_allowed", message)


def _is_loopback_address(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
