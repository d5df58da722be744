"""The rules of `recoup._retry`: pure, so they are tried without a server."""

from datetime import UTC, datetime

import pytest

from recoup._retry import Failure, delay, is_worth_another_try, seconds_of

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("failure", [Failure(status=None, sent=False), Failure(429, sent=True)])
def test_a_request_that_did_nothing_is_worth_another_try(repeatable, failure):
    assert is_worth_another_try(repeatable, failure)


@pytest.mark.parametrize("status", [None, 408, 502, 503, 504])
def test_only_what_may_be_done_twice_is_sent_again(status):
    assert is_worth_another_try(True, Failure(status, sent=True))
    assert not is_worth_another_try(False, Failure(status, sent=True))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 501])
def test_an_answer_that_would_be_the_same_again_is_final(status):
    assert not is_worth_another_try(True, Failure(status, sent=True))


def test_a_conflict_that_says_when_to_come_back_is_a_lock():
    assert is_worth_another_try(True, Failure(409, sent=True, retry_after=1.0))


@pytest.mark.parametrize(("seconds", "worth"), [(60.0, True), (60.1, False)])
def test_nobody_sleeps_for_longer_than_a_minute(seconds, worth):
    assert is_worth_another_try(True, Failure(429, sent=True, retry_after=seconds)) is worth


def test_the_delay_doubles_up_to_its_limit():
    assert [delay(attempt, jitter=0.0) for attempt in (1, 2, 3, 4, 5, 6)] == [0.5, 1, 2, 4, 8, 8]
    assert delay(100_000, jitter=0.0) == 8


def test_jitter_shortens_a_delay_by_at_most_a_half():
    assert delay(3, jitter=0.5) == 1.5
    assert 1.0 < delay(3, jitter=0.999) < 1.1


def test_retry_after_replaces_the_delay():
    assert delay(5, jitter=0.3, retry_after=0.0) == 0
    assert delay(1, jitter=0.3, retry_after=7.0) == 7


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        (" 3 ", 3.0),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 12:00:30 -0000", None),
        ("-1", None),
        ("soon", None),
        ("²", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert seconds_of(header, NOW) == seconds
