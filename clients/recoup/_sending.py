"""Sending one call until it is answered, or until another try would do no good.

What is worth another try is decided in `_retry.py`, what an error is called in `errors.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from recoup import _retry, errors
from recoup._calls import Call
from recoup._flow import WORLD, Flow, Head, Open, RawResponse, Sleep, Unanswered, World, read_all

T = TypeVar("T")


def sending(call: Call[T], origin: str, max_retries: int, world: World = WORLD) -> Flow[RawResponse[T]]:
    """The answer, after at most `max_retries` further tries.

    Every POST carries an `Idempotency-Key`, the same in each try, so that a server which has
    seen it already answers as it did then. Raises APIStatusError or APIConnectionError.
    """
    call = keyed(call, world)
    tries = 0
    while True:
        tries += 1
        try:
            head = yield from opened(call, world)
            content = yield from read_all()
            return RawResponse(call, origin, head.status, head.headers, content, tries)
        except (Unanswered, errors.APIStatusError) as failed:
            error, failure = reason(failed)
        if tries > max_retries or not _retry.is_worth_another_try(call.is_repeatable, failure):
            raise error
        yield Sleep(_retry.delay(tries, world.jitter(), failure.retry_after))


def opened(call: Call[Any], world: World = WORLD) -> Flow[Head]:
    """The head of an answer that says yes. Raises Unanswered or APIStatusError."""
    head: Head = yield Open(call)
    if head.is_success:
        return head
    content = yield from read_all()
    problem = errors.problem_of(head.status, content, head.headers.get("x-request-id", ""))
    retry_after = _retry.seconds_of(head.headers.get("retry-after"), world.now())
    raise errors.status_error(problem, retry_after)


def keyed(call: Call[T], world: World) -> Call[T]:
    """A POST with a key of its own, unless the caller gave it one."""
    if call.method != "POST" or call.is_repeatable:
        return call
    return replace(call, headers=(*call.headers, ("Idempotency-Key", world.new_key())))


def reason(failed: Unanswered | errors.APIStatusError) -> tuple[errors.RecoupError, _retry.Failure]:
    """What to tell the caller of a failed try, and what decides about the next."""
    if isinstance(failed, Unanswered):
        return failed.error, _retry.Failure(status=None, sent=failed.sent)
    return failed, _retry.Failure(failed.status, sent=True, retry_after=failed.retry_after)
