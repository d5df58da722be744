"""Whether two series rise and fall together: Spearman's and Kendall's rank correlation, with 95 % intervals.

Spearman's ρ is Pearson's correlation of ranks, ties at their mean rank; Kendall's τ_b is the surplus of
concordant over discordant pairs, corrected for ties. Intervals are Fisher's, z = atanh r ± 1.96 s:

    ρ    s² = (1 + ρ²/2) / (n - 3)    (Bonett and Wright 2000, Psychometrika 65)
    τ    s² = 0.437 / (n - 4)         (Fieller, Hartley and Pearson 1957, Biometrika 44)

They hold for independent points. Below five points there is no interval, nor at ±1, where z is infinite;
below three there is no correlation, nor where a series is constant.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from recoup.schemas import Estimate
from recoup_ml.hsic import Array

FEWEST, FEWEST_FOR_INTERVAL = 3, 5
Z_975 = 1.959964


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Spearman's ρ of two series of equal length."""
    if not _vary(x, y):
        return None
    rho = float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])
    return _interval(rho, len(x), lambda r, n: (1 + r * r / 2) / (n - 3))


def kendall(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Kendall's τ_b of two series of equal length."""
    if not _vary(x, y):
        return None
    signs = np.array(
        [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in combinations(zip(x, y, strict=True), 2)]
    )
    untied_x, untied_y = np.square(signs).sum(0)
    tau = float(signs.prod(1).sum() / math.sqrt(untied_x * untied_y))
    return _interval(tau, len(x), lambda _, n: 0.437 / (n - 4))


def _vary(x: Sequence[float], y: Sequence[float]) -> bool:
    return len(x) >= FEWEST and len(set(x)) > 1 and len(set(y)) > 1


def _ranks(values: Sequence[float]) -> Array:
    """From 1; equal values share the mean of their ranks."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return np.asarray((column > column.T).sum(1) + ((column == column.T).sum(1) + 1) / 2)


def _interval(r: float, n: int, variance: Callable[[float, int], float]) -> Estimate:
    if n < FEWEST_FOR_INTERVAL or abs(r) > 1 - 1e-12:
        return Estimate(value=min(1.0, max(-1.0, r)), low=None, high=None)
    half = Z_975 * math.sqrt(variance(r, n))
    return Estimate(value=r, low=math.tanh(math.atanh(r) - half), high=math.tanh(math.atanh(r) + half))
