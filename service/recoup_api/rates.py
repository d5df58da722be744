"""How often one key may call: a bucket of tokens for each, refilled all the time."""

import math
import time
from collections.abc import Callable

from recoup_jobs.errors import TooMany


class Rates:
    """Holds the buckets of this process."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Raises `TooMany` where the bucket is empty."""
        left, since = self._buckets.get(key, (float(self._burst), 0.0))
        moment = self._clock()
        left = min(self._burst, left + (moment - since) * self._per_second)
        if left < 1:
            wait = math.ceil((1 - left) / self._per_second)
            raise TooMany("rate_limited", f"this key may call {self._per_second:g} times a second", wait)
        self._buckets[key] = left - 1, moment
