"""The door: every answer gets its request id, and nobody passes without the right to.

With a key in the settings, everything but probes and documentation asks for it. Without one
the service is for this machine alone, and a request must name it by a loopback name: that
is what stops a web page from reaching it through a name of its own that resolves to
127.0.0.1 (DNS rebinding).
"""

import hmac
import re
import secrets
from ipaddress import ip_address

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recoup_api.limit import require_countable_body, require_small_headers
from recoup_api.problems import answer
from recoup_jobs.errors import BadRequest, RecoupError, Unauthorized

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, api_key: SecretStr | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.get_secret_value()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id

        bodiless = scope["method"] == "HEAD"
        if bodiless:  # what GET would answer, but for the body
            scope = {**scope, "method": "GET"}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                await send(message)
                if bodiless:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif not bodiless:
                await send(message)

        try:
            require_small_headers(scope)
            require_countable_body(headers)
            self._admit(scope["path"], headers)
        except RecoupError as refusal:
            return await answer(refusal, request_id)(scope, receive, send_named)
        return await self._app(scope, receive, send_named)

    def _admit(self, path: str, headers: Headers) -> None:
        if self._api_key is None:
            _require_loopback(headers.get("host", ""))
        elif path not in OPEN_PATHS:
            _require_key(self._api_key, headers.get("authorization", ""))


def _request_id(offered: str) -> str:
    return offered if REQUEST_ID.fullmatch(offered) else f"req_{secrets.token_hex(12)}"


def _require_key(key: str, authorization: str) -> None:
    scheme, _, offered = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(offered.strip().encode(), key.encode()):
        raise Unauthorized("unauthorized", "send this server's key as `Authorization: Bearer <key>`")


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
