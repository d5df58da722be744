"""How many requests a server shall have at a time, found by trying.

Too few leave a server idle, too many make it throw away work that it began. Nobody knows the
number beforehand, so it is found as TCP finds how much a wire takes (slow start, RFC 5681),
with throughput as the sign: the window grows by one with every answer, doubling from round to
round, until a round brings hardly more tokens a second than the best before it. From then on
it holds, and now and then tries a larger window for a round. A server that refuses work halves it.

Pure arithmetic: the clock comes in as an argument, nothing here waits.
"""

from dataclasses import dataclass

FIRST, MOST = 16, 512
"""Requests at a time: in the beginning, and whatever the server takes."""
GAIN = 1.05
"""So much more than the best round is worth more requests."""
PATIENCE = 2
"""Rounds without gain that end the search: one alone may be noise, or answers of the round before."""
ROUNDS = 8
"""Rounds from one try to the next."""
ROUND = 24
"""A round has at least so many answers; fewer measure nothing."""


@dataclass(frozen=True)
class _Best:
    limit: int
    rate: float


class Window:
    """The window of one server; a round is as many answers as the window was wide at its beginning."""

    def __init__(self) -> None:
        self.limit = FIRST
        self._searching, self._idle_rounds = True, 0
        self._best = _Best(FIRST, 0.0)
        self._begin_round(None)

    def answered(self, tokens: int, now: float) -> None:
        """One answer of so many tokens came, and more was there to ask.

        What a server does with fewer requests than it may have says nothing about the window.
        """
        if self._began is None:
            self._begin_round(now)
            return
        self._answers += 1
        self._tokens += tokens
        if self._searching:
            self.limit = min(self.limit + 1, MOST, 2 * self._width)
        if self._answers >= max(self._width, ROUND):
            self._end_round(self._tokens / max(now - self._began, 1e-9))
            self._begin_round(now)

    def refused(self) -> None:
        """The server said that it has too much to do."""
        self.limit = max(1, self.limit // 2)
        self._searching, self._idle_rounds = False, 0
        self._best = _Best(self.limit, 0.0)
        self._begin_round(None)

    def _begin_round(self, now: float | None) -> None:
        self._began, self._width, self._answers, self._tokens = now, self.limit, 0, 0

    def _end_round(self, rate: float) -> None:
        if rate > GAIN * self._best.rate:
            self._best, self._idle_rounds = _Best(self.limit, rate), 0
            return
        self._idle_rounds += 1
        if self._searching and self._idle_rounds >= PATIENCE:
            self._searching, self._idle_rounds = False, 0
            self.limit = self._best.limit
        elif not self._searching and self._idle_rounds >= ROUNDS:
            # What was best long ago may be out of reach today: the last round is the new measure.
            self._best, self._idle_rounds = _Best(self.limit, rate), 0
            self._searching = True
