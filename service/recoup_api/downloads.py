"""A published file as an answer: whole, or the one range that was asked for (RFC 9110, section 14).

The entity tag is the content's own hash. What is sent whole is checked against that hash on its way: where
the store does not hold what was published, the connection breaks before the last part.
"""

import re
from collections.abc import Mapping
from itertools import chain
from mimetypes import guess_type

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from recoup_jobs.artifacts import OpenArtifact
from recoup_jobs.errors import RangeNotSatisfiable

ONE_RANGE = re.compile(r"bytes=(?!-$)(\d{1,18})?-(\d{1,18})?")


class Download(Response):
    """Answers with the file, or with the part of it that the request's `Range` names."""

    def __init__(
        self, opened: OpenArtifact, headers: Mapping[str, str] | None = None, media_type: str | None = None
    ) -> None:
        guessed = guess_type(opened.artifact.path)[0] or "application/octet-stream"
        super().__init__(headers=headers, media_type=media_type or guessed)
        self._opened = opened
        self.headers["etag"] = f'"{opened.artifact.sha256}"'
        self.headers["accept-ranges"] = "bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, size = Headers(scope=scope), self._opened.artifact.size
        unchanged = asked.get("if-range", self.headers["etag"]) == self.headers["etag"]
        part = _range(asked.get("range", ""), size) if unchanged else None
        start, stop = part or (0, size)
        self.headers["content-length"] = str(stop - start)
        if part is not None:
            self.headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        parts = self._opened.parts(start, stop)
        first = await run_in_threadpool(next, parts, b"")  # a store that is away is told before all else
        sent = StreamingResponse(chain((first,), parts), 206 if part else 200, self.headers)
        await sent(scope, receive, send)


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of the one range; None, which is all, where none is asked for or none can be read."""
    found = ONE_RANGE.fullmatch(asked.strip())
    if found is None:
        return None
    first, last = (int(number) if number else None for number in found.groups())
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    else:
        start, stop = first, size if last is None else min(last + 1, size)
        if last is not None and last < first:
            return None
    if start >= size:
        message = f"the file has {size} bytes; ask for a range that begins before its end"
        raise RangeNotSatisfiable("range_not_satisfiable", message)
    return start, stop
