"""How often one key may call: a bucket of tokens for each, refilled all the time.

Where a bucket stands is told in the headers `RateLimit-Policy` and `RateLimit` of the IETF's draft
(draft-ietf-httpapi-ratelimit-headers-10): `q` calls in `w` seconds; `r` are left, and in `t` seconds all are.
"""

import math
import time
from collections.abc import Callable

from recoup_jobs.errors import TooMany

POLICY = "key"


class Rates:
    """Holds the buckets of this process."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._policy = f'"{POLICY}";q={burst};w={math.ceil(burst / per_second)}'.encode()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Raises `TooMany` where the bucket is empty."""
        left, moment = self._left(key)
        if left < 1:
            wait = math.ceil((1 - left) / self._per_second)
            raise TooMany("rate_limited", f"this key may call {self._per_second:g} times a second", wait)
        self._buckets[key] = left - 1, moment

    def headers(self, key: str) -> list[tuple[bytes, bytes]]:
        """Where the bucket stands."""
        left, _ = self._left(key)
        full = math.ceil((self._burst - left) / self._per_second)
        stands = f'"{POLICY}";r={int(left)};t={full}'
        return [(b"ratelimit-policy", self._policy), (b"ratelimit", stands.encode())]

    def _left(self, key: str) -> tuple[float, float]:
        """How many tokens there are by now, and when that is."""
        left, since = self._buckets.get(key, (float(self._burst), 0.0))
        moment = self._clock()
        return min(float(self._burst), left + (moment - since) * self._per_second), moment
