"""What a client does over time, written once for threads and for event loops.

A *flow* is a generator that does nothing itself. It yields an effect (open this call, read
on, sleep), and is sent what came of it or is thrown the error that it met. The two drivers
of `_http.py` perform effects, one on the calling thread, one by `await`; everything that
has an order or a decision (retries, pages, waiting, events, downloads) is a flow, so the
synchronous and the asynchronous client cannot differ in it. (Effects are named tuples: that
is the kind of frozen value that costs least to define, and every import pays for it.)

    def both(first: Call[T], second: Call[T]) -> Flow[tuple[T, T]]:
        return (yield from send(first)), (yield from send(second))
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import ValidationError

from recoup._calls import Call
from recoup.errors import APIConnectionError, InvalidAnswerError

T = TypeVar("T")


class Send(NamedTuple, Generic[T]):
    """Send the call, again where that is safe. Gives a RawResponse; throws what `errors.py` names."""

    call: Call[T]


class Open(NamedTuple):
    """Send the call once. Gives its Head, once that is there; throws Unanswered."""

    call: Call[Any]


class Read(NamedTuple):
    """Read on in what was opened last. Gives bytes, none at the end; throws Unanswered."""


class Sleep(NamedTuple):
    seconds: float


class Run(NamedTuple):
    """Do work that blocks for long (hashing a file), off the event loop if there is one. Gives its result."""

    work: Callable[[], Any]


class Tell(NamedTuple):
    """Call the user back; what the callback returns is awaited where that is possible."""

    callback: Callable[[Any], object]
    value: object


class Emit(NamedTuple):
    """Hand a value to whoever iterates over this flow."""

    value: Any


class Done(NamedTuple):
    """The flow has returned this."""

    value: Any


Effect: TypeAlias = Send[Any] | Open | Read | Sleep | Run | Tell | Emit
Flow: TypeAlias = Generator[Effect, Any, T]


class Head(NamedTuple):
    """An answer, before its body."""

    status: int
    headers: Mapping[str, str]
    """Names are found whatever their case."""

    @property
    def is_success(self) -> bool:
        """2xx, or 304, which is the answer to a condition."""
        return 200 <= self.status < 300 or self.status == 304


class Unanswered(Exception):
    """One try of one call that brought no answer, or only a part of it."""

    def __init__(self, error: APIConnectionError, sent: bool) -> None:
        super().__init__(error, sent)
        self.error = error
        """What to tell the caller."""
        self.sent = sent
        """Whether the server may have seen the request."""


@dataclass(frozen=True)
class RawResponse(Generic[T]):
    """An answer as it came: `client.with_raw_response.recoveries.get(id).headers`."""

    call: Call[T]
    origin: str
    """Scheme, host and port of the server."""
    status: int
    headers: Mapping[str, str]
    """Names are found whatever their case."""
    content: bytes
    tries: int
    """How often the request was sent."""

    @property
    def request_id(self) -> str:
        """What to quote when asking the operator; empty if the answer carried none."""
        return self.headers.get("x-request-id", "")

    def parse(self) -> T:
        """The value that the plain client returns. Raises InvalidAnswerError."""
        try:
            return self.call.parse(self.content)
        except ValidationError as error:
            raise InvalidAnswerError(
                f"{self.origin} answered {self.call.method} {self.call.path} with something that this client "
                "cannot read. Is it a Recoup server, and of this version?"
            ) from error


class World(NamedTuple):
    """The chance and the clocks that flows ask."""

    jitter: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    new_key: Callable[[], str] = lambda: str(uuid.uuid4())


WORLD = World()


def send(call: Call[T]) -> Flow[T]:
    """The parsed answer to a call."""
    raw: RawResponse[T] = yield Send(call)
    return raw.parse()


def read_all() -> Flow[bytes]:
    """The rest of what was opened last."""
    chunks = []
    while chunk := (yield Read()):
        chunks.append(chunk)
    return b"".join(chunks)


def advance(flow: Flow[Any], reply: Any = None, error: BaseException | None = None) -> Effect | Done:
    """The flow's next effect, after the last one gave `reply` or ended in `error`."""
    try:
        return flow.send(reply) if error is None else flow.throw(error)
    except StopIteration as end:
        return Done(end.value)


Callback: TypeAlias = Callable[[T], object] | Callable[[T], Awaitable[object]]
"""Called with each value; an AsyncClient awaits what it returns, if that can be awaited."""
