"""Loops at the end of an answer: found where they begin, cut to two periods, and nothing else touched."""

import random
import time

import pytest

from recoup_ml.repetition import MAX_PERIOD, repetition_start, without_loop


def looping(head: int, period: int, length: int, seed: int = 0) -> list[int]:
    """`head` distinct ids, then `length` ids of a loop of `period` distinct ids."""
    ids = random.Random(seed).sample(range(200_000), head + period)
    return ids[:head] + [ids[head + place % period] for place in range(length)]


def noisy(seed: int) -> list[int]:
    """Ids of few kinds, so that short loops come up by themselves, also within loops."""
    draw = random.Random(seed)
    block = draw.choices(range(draw.choice([1, 2, 3])), k=draw.randint(1, 40))
    return (
        draw.choices(range(3), k=draw.randint(0, 50))
        + block * draw.randint(1, 6)
        + block[: draw.randint(0, 9)]
    )


NOISE = [noisy(seed) for seed in range(100)]
LOOPS = [ids for ids in NOISE if repetition_start(ids) is not None]


@pytest.mark.parametrize("period", [1, 2, 7, 40, MAX_PERIOD])
@pytest.mark.parametrize("head", [0, 1, 30])
def test_a_loop_is_found_where_it_begins_and_cut_to_two_periods(head: int, period: int) -> None:
    ids = looping(head, period, max(3 * period, 24) + period // 2)
    assert repetition_start(ids) == head
    assert without_loop(ids) == ids[: head + 2 * period]


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [5],
        list(range(2000)),
        [*looping(10, 4, 40), 9],
        [7] * 23,
        looping(10, 20, 59),
        looping(0, MAX_PERIOD + 1, 5 * MAX_PERIOD),
        [place for number in range(40) for place in (1, 2, 3, 1000 + number)],
    ],
    ids=[
        "nothing",
        "one token",
        "no repetition",
        "the loop was left",
        "too few tokens",
        "not quite three times",
        "too long a period",
        "a loop that counts",
    ],
)
def test_an_answer_without_a_loop_is_untouched(ids: list[int]) -> None:
    assert repetition_start(ids) is None
    assert without_loop(ids) is ids


def test_the_limits_can_be_set() -> None:
    ids = looping(5, 3, 9)
    assert repetition_start(ids) is None
    assert repetition_start(ids, min_tokens=9) == 5
    assert repetition_start(ids, min_tokens=9, min_repeats=4) is None
    assert repetition_start(ids, min_tokens=9, max_period=2) is None


def test_the_shortest_period_counts() -> None:
    """Forty times one token has every period; two tokens are left of it."""
    assert without_loop([3, 4] + [5] * 40) == [3, 4, 5, 5]


def test_a_loop_around_a_loop_goes_too() -> None:
    outer = [*[1] * 30, 2, 3]
    assert without_loop(outer * 4 + [1] * 30) == outer * 2


@pytest.mark.parametrize("ids", NOISE)
def test_what_is_left_ends_in_no_loop_and_was_there_before(ids: list[int]) -> None:
    left = without_loop(ids)
    assert repetition_start(left) is None
    assert without_loop(left) is left
    assert ids[: len(left)] == left
    assert (left == ids) == (ids not in LOOPS)


@pytest.mark.parametrize("ids", LOOPS)
def test_a_loop_reaches_back_as_far_as_its_shortest_period(ids: list[int]) -> None:
    start = repetition_start(ids)
    assert start is not None
    tail = ids[start:]
    period = min(size for size in range(1, len(tail) // 3 + 1) if tail[size:] == tail[:-size])
    assert start == 0 or ids[start - 1] != ids[start - 1 + period]


@pytest.mark.parametrize(
    "ids",
    [[1] * 200_000, looping(100_000, 128, 100_000), ([1] * 23 + [2]) * 8000, [1, 2] * 100_000 + [3]],
    ids=["one token", "a long period", "nearly loops", "a loop that was left"],
)
def test_long_answers_take_no_time(ids: list[int]) -> None:
    started = time.process_time()
    without_loop(ids)
    assert time.process_time() - started < 1
