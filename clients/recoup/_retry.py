"""Which failed tries are worth another, and how long to wait before it. Pure: nothing here sleeps.

A try that may have reached the server is repeated only where repeating does no harm
(GET, DELETE). A POST is repeated only if not a byte of it left, else it might create
a second job. The pause doubles with each try, is spread by jitter (so that clients
that failed together do not come back together), and gives way to the server's own
`Retry-After`.
"""

from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
FIRST_DELAY, LONGEST_DELAY, LONGEST_RETRY_AFTER = 0.5, 8.0, 60.0
"""Seconds."""


@dataclass(frozen=True)
class Failure:
    """How one try failed."""

    status: int | None
    """The HTTP status; None where no answer came."""
    sent: bool
    """Whether the server may have seen the request."""
    retry_after: str | None = None
    """The header of that name."""


def is_worth_another_try(method: str, failure: Failure) -> bool:
    """Whether a request of this method may be sent again after this failure."""
    if not failure.sent:
        return True
    harmless = method in {"GET", "DELETE"}
    return harmless and (failure.status is None or failure.status in RETRIED_STATUSES)


def delay(attempt: int, jitter: float, retry_after: float | None = None) -> float:
    """Seconds to wait after the given failed attempt (from 1); `jitter` lies in [0, 1).

    0.5 s, 1 s, 2 s … up to 8 s, each shortened by up to a half; `retry_after` replaces it, up to 60 s.
    """
    if retry_after is not None:
        return min(retry_after, LONGEST_RETRY_AFTER)
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
