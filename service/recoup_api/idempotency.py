"""`Idempotency-Key`, as Stripe means it: the same key and request get the same answer, and are done once.

Another request under the key is 422. A second one that comes while the first is at work is 409, and worth
another try. What was refused is not kept: a corrected request may use the key again.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Header, Request, Response
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from recoup_jobs import answers
from recoup_jobs.answers import Answer
from recoup_jobs.errors import BadRequest, InFlight, Unprocessable
from recoup_jobs.ledger import Ledger

GRAMMAR = r"^[\x21-\x7e]{1,255}$"

Keep = Callable[[Connection, Callable[[], Answer]], None]
"""Called inside the transaction that creates; asks for the answer only if there is a key."""

IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", json_schema_extra={"pattern": GRAMMAR, "minLength": 1})
]


class InFlightKeys:
    """The keys that requests of this process are at work on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: set[tuple[str, str]] = set()

    @contextmanager
    def alone(self, of: answers.Request) -> Iterator[None]:
        name = of.tenant, of.key
        with self._lock:
            if name in self._held:
                raise InFlight("idempotency_in_flight", "a request with this key is at work; wait")
            self._held.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(name)


def answer_once(
    request: Request, key: str | None, asked_for: Callable[[], str], make: Callable[[Keep], Answer]
) -> Response:
    """What `make` answers, or answered before; `make` passes what it is given on into its transaction.

    `asked_for` tells what a retry must repeat; it is not called where there is no key.
    """
    require_key(key)
    if key is None:
        return _response(make(lambda *_: None))
    ledger: Ledger = request.app.state.ledger
    asked = answers.Request(request.state.caller.tenant, key, _whole(request, asked_for()))
    in_flight: InFlightKeys = request.app.state.in_flight
    with in_flight.alone(asked):
        if (given := answers.recall(ledger, asked)) is not None:
            return _again(asked, given)
        try:
            return _response(make(lambda conn, answer: answers.remember(conn, asked, answer())))
        except IntegrityError:  # another process was faster
            if (given := answers.recall(ledger, asked)) is None:
                raise
            return _again(asked, given)


def require_key(key: str | None) -> None:
    """Raises `BadRequest` for what is no key; there need not be one."""
    if key is not None and not re.fullmatch(GRAMMAR, key):
        raise BadRequest("invalid_idempotency_key", "a key has 1 to 255 printable ASCII characters")


def fingerprint_of(*parts: bytes) -> str:
    return hashlib.sha256(b"\x00".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _whole(request: Request, asked_for: str) -> str:
    where = f"{request.method} {request.url.path}?{request.url.query}"
    return fingerprint_of(where.encode(), asked_for.encode())


def _again(asked: answers.Request, given: answers.Given) -> Response:
    if given.fingerprint != asked.fingerprint:
        message = "this Idempotency-Key was used with another request; use a new one"
        raise Unprocessable("idempotency_key_reused", message)
    response = _response(given.answer)
    response.headers["Idempotent-Replayed"] = "true"
    return response


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, answer.headers, "application/json")
