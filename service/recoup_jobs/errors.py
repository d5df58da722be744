"""What can go wrong with a request, as one tree; each error carries its HTTP status and a code.

    RecoupError               500
    ├── CorruptArtifact            what was published is no longer there as it was
    ├── BadRequest            400  not readable as what it claims to be
    ├── Unauthorized          401  no key, or not this one
    ├── Forbidden             403  a key without the scope
    ├── NotFound              404  no such thing
    ├── Conflict              409  not in this state
    │   ├── StaleClaim             a writer whose claim on a job has passed to another
    │   └── InFlight               the same request is at work already
    ├── PreconditionFailed    412  it has changed since
    ├── TooLarge              413
    ├── UnsupportedMedia      415
    ├── RangeNotSatisfiable   416
    ├── Unprocessable         422  cannot be accepted as it was sent; names each finding
    ├── TooMany               429  too often, or too much at a time
    ├── HeadersTooLarge       431
    └── Unavailable           503  try again later

A message is a sentence: what was expected, what was found, what to do. Why a *job* failed
is a different thing: `recoup.schemas.JobError`.
"""

from collections.abc import Sequence
from typing import ClassVar

from recoup.schemas import ProblemItem


class RecoupError(Exception):
    status: ClassVar[int] = 500
    retry_after: int | None = None
    """Seconds after which the same request may succeed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class CorruptArtifact(RecoupError):
    """The store lost or changed what it was given."""


class BadRequest(RecoupError):
    status = 400


class Unauthorized(RecoupError):
    status = 401


class Forbidden(RecoupError):
    status = 403


class NotFound(RecoupError):
    status = 404


class Conflict(RecoupError):
    status = 409


class StaleClaim(Conflict):
    """Stop working: the job has another owner by now, or has ended."""


class InFlight(Conflict):
    retry_after = 1


class PreconditionFailed(RecoupError):
    status = 412


class TooLarge(RecoupError):
    status = 413


class UnsupportedMedia(RecoupError):
    status = 415


class RangeNotSatisfiable(RecoupError):
    status = 416


class Unprocessable(RecoupError):
    status = 422

    def __init__(self, code: str, message: str, items: Sequence[ProblemItem] = ()) -> None:
        super().__init__(code, message)
        self.args = (code, message, list(items))
        self.items = list(items)


class TooMany(RecoupError):
    status = 429

    def __init__(self, code: str, message: str, retry_after: int = 1) -> None:
        super().__init__(code, message)
        self.args = (code, message, retry_after)
        self.retry_after = retry_after


class HeadersTooLarge(RecoupError):
    status = 431


class Unavailable(RecoupError):
    status = 503
