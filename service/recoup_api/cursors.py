"""Cursors of lists: opaque, and signed with whose list it is and how it was filtered."""

import base64
import hmac

from fastapi import Request

from recoup_jobs.errors import BadRequest
from recoup_jobs.signing import sign


def seal(request: Request, cursor: str | None, *scope: str) -> str | None:
    """The cursor as clients get it; `scope` is what it is good for."""
    if cursor is None:
        return None
    return base64.urlsafe_b64encode(f"{cursor}.{_mark(request, cursor, scope)}".encode()).decode().rstrip("=")


def unseal(request: Request, sealed: str | None, *scope: str) -> str | None:
    """Raises `BadRequest` for a cursor that this installation never gave out for this list."""
    if sealed is None:
        return None
    try:
        text = base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)).decode("ascii")
    except ValueError:
        text = ""
    cursor, _, mark = text.rpartition(".")
    if not hmac.compare_digest(mark, _mark(request, cursor, scope)):
        raise BadRequest("invalid_cursor", "`after` must be the next_cursor of an earlier page of this list")
    return cursor


def _mark(request: Request, cursor: str, scope: tuple[str, ...]) -> str:
    return sign(request.app.state.secret, request.state.caller.tenant, request.url.path, *scope, cursor)
