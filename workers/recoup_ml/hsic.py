"""Centered Kernel Alignment of two models' hidden states, without bias from small samples.

Linear CKA compares two sets of activations of the same tokens by their Gram matrices
(Kornblith et al. 2019, arXiv 1905.00414):  HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  K = X X', L = Y Y'.
Taken over all entries it tends to 1 as width grows over samples, and tokens of one text, which
resemble each other, count as agreement. Here HSIC is its U-statistic (Song et al. 2012, HSIC_1) with
"different rows" read as "rows of different *groups of whole sequences*":

    HSIC = E k(a,b) l(a,b) - 2 E k(a,b) l(a,c) + E k(a,b) l(c,d),    a, b, c, d from four groups

No diagonal and no pair inside a text, so no credit for sharing one; the second and third term are
what centring stands for, so a mean over few texts ties nothing together. With a row a group it is
the debiased CKA of the literature. Deleting one group at a time gives its jackknife interval.

States are shifted by their mean and scaled to unit size in float32 before any product (uncentred
float32 returns 1.0 for a truth of 0.80); sums are kept in float64. Nothing is clamped: an estimate may
be below 0 or above 1, and is NaN where a self-product is not positive. CKA does not change under
rotation, scale or shift of either side.

This module computes; which positions enter is `alignment.py`'s business.

Axes: L and M layers of either model, N rows, G groups, P pairs of groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
PairSums = dict[tuple[int, int], Tensor]
"""Something of each pair of groups."""
Combine = Callable[[Tensor, Tensor], Tensor]
"""Inner products of layers' rows: of every two layers, or of each with its like."""


@dataclass(frozen=True)
class Products:
    """HSIC of all layer pairs: first without each group in turn, last over all groups."""

    xy_KLM: Array
    xx_KL: Array
    yy_KM: Array
    groups: int

    def without(self, group: int) -> "Products":
        """What is left when the rows of one group are taken out."""
        only = slice(group, group + 1)
        return Products(self.xy_KLM[only], self.xx_KL[only], self.yy_KM[only], self.groups - 1)


@dataclass(frozen=True)
class Interval:
    """A value with its jackknife standard error and 95 % interval."""

    value: float
    low: float
    high: float
    se: float


def products(x: Sequence[Tensor], y: Sequence[Tensor], groups_N: Tensor) -> Products:
    """HSIC of all layer pairs of two models.

    Args:
        x, y: one [N, D] tensor a layer, the same N positions in both; widths and depths may differ.
        groups_N: the group of each position, 0..G-1; all positions of a sequence share one.

    Raises:
        ValueError: fewer than 5 groups (four, and one to leave out), or states that do not match.
    """
    sizes_G = torch.bincount(groups_N)
    if len(sizes_G) < 5 or {len(layer) for layer in (*x, *y)} != {len(groups_N)}:
        raise ValueError("CKA needs the same positions in every layer, from at least 5 groups of sequences.")
    order = groups_N.argsort(stable=True)
    first, second = (_side([layer[order] for layer in layers], sizes_G) for layers in (x, y))
    xy, xx, yy = _pairs(first, second)
    return Products(
        _jackknifed(first, second, xy, sizes_G, _every_pair),
        _jackknifed(first, first, xx, sizes_G, torch.linalg.vecdot),
        _jackknifed(second, second, yy, sizes_G, torch.linalg.vecdot),
        len(sizes_G),
    )


def matrix(sums: Products) -> Array:
    """CKA of every layer pair, [L, M]; NaN where a self-product is not positive."""
    xx_L, yy_M = sums.xx_KL[-1], sums.yy_KM[-1]
    norm_LM = np.sqrt(np.outer(np.where(xx_L > 0, xx_L, np.nan), np.where(yy_M > 0, yy_M, np.nan)))
    return np.asarray(sums.xy_KLM[-1] / norm_LM, dtype=np.float64)


def jackknife(value: float, leave_one_out: Sequence[float], t_quantile: float = 2.0) -> Interval:
    """Delete-one-group jackknife: se² = (G-1)/G Σ (θ_g - θ̄)²; a group owns its sequences.

    `t_quantile` is Student's t at 97.5 % with G - 1 degrees of freedom (2.04 at 32, 2.13 at 16).
    """
    thetas = np.asarray(leave_one_out)
    g = len(thetas)
    se = float(np.sqrt((g - 1) / g * np.square(thetas - thetas.mean()).sum()))
    return Interval(value, value - t_quantile * se, value + t_quantile * se, se)


def t_975(freedom: int) -> float:
    """Student's t, 97.5 %, by the expansion of Cornish and Fisher: to 0.01 from 4 degrees of freedom on."""
    z, terms = 1.959964, (freedom, freedom**2, freedom**3)
    corrections = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(part / term for part, term in zip(corrections, terms, strict=True))


@dataclass(frozen=True)
class _Side:
    """One model's layers, cut into groups, and the sums of their kernel over rows of a group."""

    parts: list[tuple[Tensor, ...]]
    row_LNG: Tensor
    """Σ_b k(row, b) over the rows b of each group; 0 for the row's own."""
    block_LGG: Tensor
    """Σ_ab k(a, b) over the rows of two groups; 0 on the diagonal."""


def _side(layers: Sequence[Tensor], sizes_G: Tensor) -> _Side:
    parts = [_scaled(layer).split(sizes_G.tolist()) for layer in layers]
    own_NG = torch.nn.functional.one_hot(torch.arange(len(sizes_G)).repeat_interleave(sizes_G)).bool()
    sums_LGD = [torch.stack([part.double().sum(0) for part in layer]) for layer in parts]
    row_LNG = torch.stack([torch.cat(p).double() @ s.T for p, s in zip(parts, sums_LGD, strict=True)])
    block_LGG = torch.stack([(s @ s.T).fill_diagonal_(0.0) for s in sums_LGD])
    return _Side(parts, row_LNG.masked_fill(own_NG, 0.0), block_LGG)


def _scaled(layer: Tensor) -> Tensor:
    centred = layer.float() - layer.double().mean(0).float()
    return centred / (float(centred.double().square().mean().sqrt()) or 1.0)


def _jackknifed(x: _Side, y: _Side, pairs: PairSums, sizes_G: Tensor, layers: Combine) -> Array:
    """HSIC of the layers that `layers` brings together, without each group in turn, and over all groups."""
    return np.array(
        [_hsic(x, y, pairs, sizes_G, left_out, layers) for left_out in [*range(len(sizes_G)), None]]
    )


def _every_pair(a_LK: Tensor, b_MK: Tensor) -> Tensor:
    return a_LK @ b_MK.T


def _pairs(x: _Side, y: _Side) -> tuple[PairSums, PairSums, PairSums]:
    """Σ k(a, b) l(a, b) over the rows of each pair of groups: [L, M], and of either model with itself."""
    groups = x.row_LNG.shape[2]
    xy: PairSums = {}
    xx: PairSums = {}
    yy: PairSums = {}
    for a in range(groups):
        for b in range(a + 1, groups):
            grams_x, grams_y = _grams(x.parts, a, b), _grams(y.parts, a, b)
            xy[a, b] = (grams_x @ grams_y.T).double()
            xx[a, b] = torch.linalg.vecdot(grams_x, grams_x).double()
            yy[a, b] = torch.linalg.vecdot(grams_y, grams_y).double()
    return xy, xx, yy


def _grams(parts: Sequence[tuple[Tensor, ...]], a: int, b: int) -> Tensor:
    """The Gram blocks between groups a and b, flattened: [L, m_a * m_b]."""
    return torch.stack([(layer[a] @ layer[b].T).flatten() for layer in parts])


def _hsic(
    x: _Side, y: _Side, pairs: PairSums, sizes_G: Tensor, left_out: int | None, layers: Combine
) -> Array:
    """The three sums over rows of different groups, each divided by how many there are."""
    stay = torch.tensor([group for group in range(len(sizes_G)) if group != left_out])
    rows = torch.isin(torch.arange(len(sizes_G)).repeat_interleave(sizes_G), stay)
    k_LNG, l_MNG = x.row_LNG[:, rows][:, :, stay], y.row_LNG[:, rows][:, :, stay]
    k_LGG, l_MGG = (side.block_LGG[:, stay][:, :, stay] for side in (x, y))
    two = 2 * torch.stack([value for pair, value in pairs.items() if left_out not in pair]).sum(0)
    three = layers(k_LNG.sum(2), l_MNG.sum(2)) - layers(k_LNG.flatten(1), l_MNG.flatten(1))
    four = (
        layers(k_LGG.sum((1, 2)).unsqueeze(1), l_MGG.sum((1, 2)).unsqueeze(1))
        - 4 * layers(k_LGG.sum(2), l_MGG.sum(2))
        + 2 * layers(k_LGG.flatten(1), l_MGG.flatten(1))
    )
    n2, n3, n4 = _tuples(sizes_G[stay])
    return (two / n2 - 2 * three / n3 + four / n4).numpy()


def _tuples(sizes_G: Tensor) -> tuple[float, float, float]:
    """How many ordered pairs, triples and quadruples of rows there are with every row in another group."""
    p1, p2, p3, p4 = (float((sizes_G.double() ** power).sum()) for power in (1, 2, 3, 4))
    return (
        p1**2 - p2,
        p1**3 - 3 * p1 * p2 + 2 * p3,
        p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4,
    )
