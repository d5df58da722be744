"""How much a client may send, and how slowly; bytes are counted as they arrive, whatever headers claim."""

import asyncio
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recoup_jobs.errors import BadRequest, HeadersTooLarge, UnsupportedMedia

LONGEST_BODY = 1 << 20
LONGEST_HEADERS = 32 << 10
LONGEST_HEAD = 256 << 10
"""What uvicorn reads of a head: enough to answer in our words that it is too long."""
PATIENCE_SECONDS = 15.0
SLOWEST_BYTES_PER_SECOND = 16 << 10


class BodyLimit:
    """ASGI middleware: whoever reads on past the limit gets a 413 to raise, or past the time a 408."""

    def __init__(self, app: ASGIApp, larger_by_path: Mapping[str, int]) -> None:
        self._app = app
        self._larger_by_path = larger_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._larger_by_path.get(scope["path"], LONGEST_BODY)
        counted = _Counted(receive, limit, Headers(scope=scope).get("content-length", ""))
        return await self._app(scope, counted.receive, send)


def require_small_headers(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"])
    if size > LONGEST_HEADERS:
        message = f"headers and query may have {LONGEST_HEADERS} bytes at most"
        raise HeadersTooLarge("headers_too_large", message)


def require_countable_body(headers: Headers) -> None:
    """A body whose length is said twice, or that unpacks to something else, has a size nobody counted."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        message = "send the body without Content-Encoding; a data set may be a gzip file"
        raise UnsupportedMedia("unsupported_media_type", message)
    if "content-length" in headers and "transfer-encoding" in headers:
        raise BadRequest("bad_request", "Content-Length and Transfer-Encoding exclude each other")


class _Counted:
    def __init__(self, receive: Receive, limit: int, claimed: str) -> None:
        self._receive = receive
        self._limit = limit
        self._came = 0
        self._whole = False
        self._began = time.monotonic()
        self._claims_too_much = claimed.isdecimal() and int(claimed[:20]) > limit

    async def receive(self) -> Message:
        if self._whole:  # who listens now waits for the client to leave
            return await self._receive()
        if self._claims_too_much:
            raise HTTPException(413)
        try:
            async with asyncio.timeout(self._seconds_left()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408) from None
        self._came += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._came > self._limit:
            raise HTTPException(413)
        return message

    def _seconds_left(self) -> float:
        """A body may begin slowly; from then on it must keep up a pace."""
        due = self._began + PATIENCE_SECONDS + self._came / SLOWEST_BYTES_PER_SECOND
        return due - time.monotonic()
