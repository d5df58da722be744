"""Centered Kernel Alignment of two models' hidden states, without bias from small samples.

Linear CKA compares two sets of activations of the same tokens by their Gram matrices
(Kornblith et al. 2019, arXiv 1905.00414):  <K, L> / sqrt(<K, K> <L, L>),  K = X X', L = Y Y'.
Taken over all entries it tends to 1 as width grows over samples, and tokens of one text,
which resemble each other, count as agreement. Here the inner products run over pairs of
positions from *different groups of whole sequences* only: no diagonal, so no bias; no pair
inside a text, so no credit for sharing one. What is left is a U-statistic, and deleting one
group at a time gives its jackknife interval for nothing.

States are centred by the mean over all positions and scaled to unit size in float32 before
any product (uncentred float32 returns 1.0 for a truth of 0.80); sums are kept in float64.
Nothing is clamped: an estimate may be below 0 or above 1, and is NaN where a self-product
is not positive. CKA does not change under rotation, scale or shift of either side.

This module computes; which positions enter is `alignment.py`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Products:
    """Inner products of Gram blocks, for each pair (a, b) of different groups."""

    pairs_P2: NDArray[np.int64]
    xy_PLM: Array
    """<K_i, L_j> of layer i of the first model and layer j of the second."""
    xx_PL: Array
    yy_PM: Array
    groups: int

    def without(self, group: int) -> "Products":
        """The products with every pair of one group taken out."""
        stay = (self.pairs_P2 != group).all(axis=1)
        return Products(
            self.pairs_P2[stay], self.xy_PLM[stay], self.xx_PL[stay], self.yy_PM[stay], self.groups - 1
        )


@dataclass(frozen=True)
class Interval:
    """A value with its jackknife standard error and 95 % interval."""

    value: float
    low: float
    high: float
    se: float


def products(x: Sequence[Tensor], y: Sequence[Tensor], groups_N: Tensor) -> Products:
    """Accumulates all layer pairs of two models over all pairs of groups.

    Args:
        x, y: one [N, D] tensor a layer, the same N positions in both; widths and depths may differ.
        groups_N: the group of each position, 0..G-1; all positions of a sequence share one.

    Raises:
        ValueError: fewer than 3 groups, or states that do not match.
    """
    count = int(groups_N.max()) + 1
    if count < 3 or {len(layer) for layer in (*x, *y)} != {len(groups_N)}:
        raise ValueError("CKA needs the same positions in every layer, from at least 3 groups of sequences.")
    members = [torch.nonzero(groups_N == group).flatten() for group in range(count)]
    x_parts, y_parts = _centred_by_group(x, members), _centred_by_group(y, members)
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    xy, xx, yy = [], [], []
    for a, b in pairs:
        grams_x, grams_y = _grams(x_parts, a, b), _grams(y_parts, a, b)
        xy.append((grams_x @ grams_y.T).double().numpy())
        xx.append(grams_x.double().square().sum(1).numpy())
        yy.append(grams_y.double().square().sum(1).numpy())
    return Products(np.array(pairs), np.array(xy), np.array(xx), np.array(yy), count)


def matrix(sums: Products) -> Array:
    """CKA of every layer pair, [L, M]; NaN where a self-product is not positive."""
    xx_L, yy_M = sums.xx_PL.sum(0), sums.yy_PM.sum(0)
    norm_LM = np.sqrt(np.outer(np.where(xx_L > 0, xx_L, np.nan), np.where(yy_M > 0, yy_M, np.nan)))
    return np.asarray(sums.xy_PLM.sum(0) / norm_LM, dtype=np.float64)


def jackknife(value: float, leave_one_out: Sequence[float], t_quantile: float = 2.0) -> Interval:
    """Delete-one-group jackknife: se² = (G-1)/G Σ (θ_g - θ̄)²; a group owns its sequences.

    `t_quantile` is Student's t at 97.5 % with G - 1 degrees of freedom (2.04 at 32, 2.13 at 16).
    """
    thetas = np.asarray(leave_one_out)
    g = len(thetas)
    se = float(np.sqrt((g - 1) / g * np.square(thetas - thetas.mean()).sum()))
    return Interval(value, value - t_quantile * se, value + t_quantile * se, se)


def _centred_by_group(states: Sequence[Tensor], members: Sequence[Tensor]) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = [[] for _ in members]
    for layer in states:
        centred = layer.float() - layer.double().mean(0).float()
        size = float(centred.double().square().mean().sqrt()) or 1.0
        for group, rows in enumerate(members):
            parts[group].append(centred[rows] / size)
    return parts


def _grams(parts: list[list[Tensor]], a: int, b: int) -> Tensor:
    """The Gram blocks between groups a and b, flattened: [L, m_a * m_b]."""
    return torch.stack([(left @ right.T).flatten() for left, right in zip(parts[a], parts[b], strict=True)])
