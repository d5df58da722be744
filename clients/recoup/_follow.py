"""Following a job to its end, through restarts of the server.

A job is followed by long polls: `GET …?wait=20` with the version last seen answers as
soon as anything changed. Between two answers the server may be restarted; a follower
therefore outlives an outage of up to `PATIENCE`. Only the first call, which would show
a wrong address, fails at once.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from recoup import _calls, _retry
from recoup._calls import Call
from recoup._sender import Sender, pages
from recoup.errors import APIConnectionError, APIStatusError, RecoupError
from recoup.schemas import Event, Recovery
from recoup.schemas.recovery import TERMINAL_STATES

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds without any answer after which a follower gives up."""
LONG_POLL = 20.0
"""Seconds for which one poll is held."""
PAUSE = 0.1
"""Seconds between polls, so that a job that changes all the time does not fill the line."""


@dataclass(frozen=True)
class Follower:
    """Sends calls for as long as an outage may last."""

    sender: Sender
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def states(self, id: str, remaining: Callable[[], float]) -> Iterator[Recovery]:
        """The job now, and again after each poll, up to its terminal state.

        No poll is held for longer than `remaining()` seconds.
        """
        recovery = self.sender.send(_calls.get_recovery(id))
        yield recovery
        while recovery.state not in TERMINAL_STATES:
            self.sleep(PAUSE)
            wait = int(max(0.0, min(LONG_POLL, remaining())))
            recovery = self._send(_calls.await_change(recovery, wait)) or recovery
            yield recovery

    def events(self, id: str, after: int) -> Iterator[Event]:
        """The events so far whose `seq` is greater than `after`."""
        return pages(lambda cursor: self._send(_calls.list_events(id, cursor)), str(after))

    def _send(self, call: Call[T]) -> T:
        started = self.clock()
        attempt = 0
        while True:
            attempt += 1
            try:
                return self.sender.send(call)
            except RecoupError as error:
                if not _is_outage(error) or self.clock() - started > PATIENCE + call.hold:
                    raise
                self.sleep(_retry.delay(attempt, self.jitter()))


def _is_outage(error: RecoupError) -> bool:
    if isinstance(error, APIStatusError):
        return error.status in _retry.RETRIED_STATUSES
    return isinstance(error, APIConnectionError)
