"""Importance weights make up for a server that is not quite the student, position by position."""

import math
from itertools import product

import pytest

from recoup_ml.mismatch import CAP, Mismatch, weights

P, Q = ({0: 0.7, 1: 0.3}, {0: 0.6, 1: 0.4})
"""Of each token of an answer, whatever stands before it: the student's, and the server's."""


def drift(answer: tuple[int, ...]) -> list[float]:
    return [math.log(P[token] / Q[token]) for token in answer]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_weighted_answers_of_the_server_are_those_of_the_student_in_expectation(position: int) -> None:
    """Exactly, over all answers of four tokens, for a function of what stands before a position."""

    def before(answer: tuple[int, ...]) -> float:
        return 1.0 + sum(3**place * token for place, token in enumerate(answer[:position]))

    found = expected = 0.0
    for answer in product((0, 1), repeat=4):
        p, q = (math.prod(law[token] for token in answer) for law in (P, Q))
        found += q * weights(drift(answer))[position] * before(answer)
        expected += p * before(answer)
    assert found == pytest.approx(expected)


def test_a_position_does_not_depend_on_its_own_token_or_later_ones() -> None:
    assert (
        weights([0.1, 0.2, 9.0])[:2] == weights([0.1, -5.0, 1.0])[:2] == [1.0, pytest.approx(math.exp(0.1))]
    )


def test_weights_are_cut() -> None:
    assert weights([3.0, -4.0, 0.0]) == [1.0, pytest.approx(CAP), pytest.approx(math.exp(-1.0))]


def test_equal_policies_have_no_mismatch_and_others_have_one_that_is_told() -> None:
    same = Mismatch.of([[0.0, 0.0], [0.0]]).report()
    assert (same.answers, same.tokens, same.mean_difference, same.kl, same.truncated) == (2, 3, 0, 0, 0)
    parts = Mismatch.of([[1.0, -0.5]]) + Mismatch.of([[0.0]])
    assert parts == Mismatch.of([[1.0, -0.5], [0.0]])
    told = parts.report()
    assert told.mean_difference == pytest.approx(0.5)
    assert told.largest_difference == 1.0
    assert told.kl == pytest.approx((math.e - 2 + math.exp(-0.5) - 0.5) / 3)
    assert (told.truncated, told.cap) == (pytest.approx(1 / 3), CAP)


def test_nothing_drawn_is_nothing_told() -> None:
    assert Mismatch().report() is None
