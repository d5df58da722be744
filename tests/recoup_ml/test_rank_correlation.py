"""Rank correlations against published examples, their laws, and the coverage of their intervals."""

import numpy as np
import pytest

from recoup_ml.rank_correlation import kendall, spearman

IQ = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
HOURS = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
"""The textbook example of Spearman's ρ: -29/165."""


def test_spearman_is_the_published_value() -> None:
    assert spearman(IQ, HOURS).value == pytest.approx(-29 / 165, abs=1e-12)


def test_kendall_is_the_published_value_with_and_without_ties() -> None:
    assert kendall(IQ, HOURS).value == pytest.approx(-1 / 9, abs=1e-12)
    assert kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]).value == pytest.approx(-0.47140452079103173)


def test_ties_share_their_mean_rank() -> None:
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]).value == pytest.approx(4.5 / np.sqrt(4.5 * 5))


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_only_the_order_counts(correlation) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 12)).tolist()
    assert correlation(np.exp(x).tolist(), y) == correlation(x, y) == correlation(y, x)
    assert correlation(x, [-value for value in y]).value == pytest.approx(-correlation(x, y).value)


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_a_perfect_order_has_no_interval(correlation) -> None:
    found = correlation([*range(8)], [value**3 for value in range(8)])
    assert (found.value, found.low, found.high) == (1.0, None, None)


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_four_points_have_no_interval_and_five_do(correlation) -> None:
    assert correlation([1, 2, 3, 4], [1, 3, 2, 4]).low is None
    found = correlation([1, 2, 3, 4, 5], [1, 3, 2, 4, 5])
    assert -1 < found.low < found.value < found.high < 1


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([], [])])
def test_too_few_or_constant_points_have_no_correlation(x: list[float], y: list[float]) -> None:
    assert spearman(x, y) is None and kendall(x, y) is None


@pytest.mark.parametrize(
    ("correlation", "truth"),
    [(spearman, 6 / np.pi * np.arcsin(0.3)), (kendall, 2 / np.pi * np.arcsin(0.6))],
    ids=["spearman", "kendall"],
)
@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_covers_the_truth_of_a_normal_population(correlation, truth: float, n: int) -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        x = draw.normal(size=n)
        y = 0.6 * x + 0.8 * draw.normal(size=n)
        found = correlation(x.tolist(), y.tolist())
        covered += found.low is None or found.low <= truth <= found.high
    assert 0.90 <= covered / 400 <= 0.99
