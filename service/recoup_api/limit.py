"""How much a client may send: bytes are counted as they arrive, whatever the headers claim."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_BODY = 1 << 20


class BodyLimit:
    """ASGI middleware: whoever reads on past the limit gets a 413 to raise."""

    def __init__(self, app: ASGIApp, larger_by_path: Mapping[str, int]) -> None:
        self._app = app
        self._larger_by_path = larger_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._larger_by_path.get(scope["path"], LONGEST_BODY)
        counted = _Counted(receive, limit, Headers(scope=scope).get("content-length", ""))
        return await self._app(scope, counted.receive, send)


class _Counted:
    def __init__(self, receive: Receive, limit: int, claimed: str) -> None:
        self._receive = receive
        self._left = limit
        self._claims_too_much = claimed.isdecimal() and int(claimed[:20]) > limit

    async def receive(self) -> Message:
        if self._claims_too_much:
            raise HTTPException(413)
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413)
        return message
