"""Which failed tries are worth another, and how long to wait before it. Pure: nothing here sleeps.

A try that may have reached the server is repeated only where repeating does no harm: a
GET, DELETE or PATCH, and a POST that carries an `Idempotency-Key`. The pause doubles with
each try, is spread by jitter (so that clients that failed together do not come back
together), and gives way to the server's own `Retry-After`.
"""

from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
FIRST_DELAY, LONGEST_DELAY = 0.5, 8.0
"""Seconds."""
LONGEST_RETRY_AFTER = 60.0
"""Seconds; who is told to stay away for longer tells the caller instead of sleeping."""


class Failure(NamedTuple):
    """How one try failed."""

    status: int | None
    """The HTTP status; None where no answer came."""
    sent: bool
    """Whether the server may have seen the request."""
    retry_after: float | None = None
    """Seconds after which the server wants to be asked again."""


def is_worth_another_try(repeatable: bool, failure: Failure) -> bool:
    """Whether a request may be sent again after this failure; `repeatable`: twice does no harm."""
    if failure.retry_after is not None and failure.retry_after > LONGEST_RETRY_AFTER:
        return False
    if not failure.sent or failure.status == 429:  # nothing happened
        return True
    return repeatable and (failure.status is None or is_passing(failure))


def is_passing(failure: Failure) -> bool:
    """Whether the same request may be answered otherwise a little later.

    A conflict of state is final; one that says when to come back is a lock, held by an earlier try.
    """
    return failure.status in RETRIED_STATUSES or (failure.status == 409 and failure.retry_after is not None)


def delay(attempt: int, jitter: float, retry_after: float | None = None) -> float:
    """Seconds to wait after the given failed attempt (from 1); `jitter` lies in [0, 1).

    0.5 s, 1 s, 2 s … up to 8 s, each shortened by up to a half; `retry_after` replaces it.
    """
    if retry_after is not None:
        return retry_after
    longest = min(FIRST_DELAY * 2.0 ** min(attempt - 1, 10), LONGEST_DELAY)
    return longest * (1 - jitter / 2)


def seconds_of(retry_after: str | None, now: datetime) -> float | None:
    """What a `Retry-After` header asks for: seconds, or the time until its date; None if it says neither.

    `now` carries a time zone.
    """
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until - now).total_seconds()) if until.tzinfo else None
