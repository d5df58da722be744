"""The window finds how many requests a server takes, on servers that are simulated by their arithmetic."""

from collections.abc import Callable
from statistics import median

import pytest

from recoup_ml.window import FIRST, MOST, Window

TOKENS = 50


def usual(window: Window, rate: Callable[[int], float], answers: int) -> float:
    """The median width over the last half of so many answers, for a server of `rate(width)` tokens/s."""
    now, seen = 0.0, []
    for _ in range(answers):
        now += TOKENS / rate(window.limit)
        window.answered(TOKENS, now)
        seen.append(window.limit)
    return median(seen[answers // 2 :])


def saturating(at: int) -> Callable[[int], float]:
    return lambda limit: 10.0 * min(limit, at)


@pytest.mark.parametrize("at", [16, 40, 64, 200])
def test_a_window_grows_to_where_the_server_is_full_and_not_far_beyond(at: int) -> None:
    assert at <= usual(Window(), saturating(at), 8000) <= 4 * at


def test_a_server_that_always_gains_gets_the_most(at: int = 10_000) -> None:
    assert usual(Window(), saturating(at), 20_000) == MOST


def test_a_server_that_slows_down_under_load_gets_less() -> None:
    assert usual(Window(), lambda width: 10.0 * width if width <= 64 else 41_000.0 / width, 8000) <= 130


def test_a_server_that_answers_in_bursts_is_soon_asked_for_more() -> None:
    """Answers of the same length end together."""
    window, now = Window(), 0.0
    for _ in range(5):
        now += 0.5
        for _ in range(window.limit):
            window.answered(TOKENS, now)
    assert window.limit >= 8 * FIRST


def test_a_refusal_halves_the_window_down_to_one() -> None:
    window = Window()
    window.refused()
    assert window.limit == FIRST // 2
    for _ in range(10):
        window.refused()
    assert window.limit == 1


def test_a_window_that_was_halved_grows_again_when_the_server_is_well() -> None:
    window = Window()
    window.refused()
    window.refused()
    assert usual(window, saturating(64), 20_000) >= 64
