"""The few directions in which a layer varies most, and HSIC inside of them over all pairs of tokens.

Spectra of hidden states fall fast, and HSIC weighs by squared eigenvalues. With k' the inner product inside
a few directions, a sum over *all* pairs of tokens costs no Gram matrix: Σ k'(a, b) l'(a, b) = ‖Σ x_a y_a'‖².
From it come off the pairs inside a jackknife group, ‖Σ_group x_a y_a'‖², among them those inside a text; it
is then a control variate for the Gram blocks of `hsic_sums.py`:

    E k l = mean of kl - k'l' over the pairs of Gram blocks
            + mean of k'l' over the pairs across groups and those of Gram blocks

Unbiased whatever the directions are; good ones make kl - k'l' small, so that few pairs do. Where a spectrum
is flat little is won, and there are no directions (`WORTHWHILE`).

Axes: N tokens, D width, K random vectors, L, M layers of either model, R, S directions, G groups.
"""

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from recoup_ml.hsic import Array

AXES, SKETCHED, PROBES = 16, 24, 8
WORTHWHILE = 0.5
"""The share of Σλ² that directions must hold, as a mean over layers: the rest varies half as much, then."""
SUMS_BYTES = 2**27
"""What the sums of all pairs of directions, by group, may take in memory."""


def most_axes(student_layers: int, teacher_layers: int, groups: int) -> int:
    """Directions of a layer for which there is memory."""
    return min(AXES, isqrt(SUMS_BYTES // (8 * groups * student_layers * teacher_layers)))


class Sketch:
    """Gathers a layer's directions from rows that come in parts: of Σ x x', only (Σ x x') Ω for random Ω.

    The first left singular vectors of that are the directions (Halko, Martinsson and Tropp 2011, arXiv
    0909.4061). More random vectors tell how much of Σλ² lies in them.
    """

    def __init__(self, width: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self._omega_DK = torch.randn(width, SKETCHED + PROBES, generator=draw)
        self._image_DK = torch.zeros(self._omega_DK.shape, dtype=torch.float64)
        self._shift_D: Tensor | None = None

    def add(self, rows_ND: Tensor) -> None:
        if self._shift_D is None:
            self._shift_D = rows_ND.mean(0)
        rows_ND = rows_ND - self._shift_D
        self._omega_DK = self._omega_DK.to(rows_ND)
        self._image_DK += (rows_ND.T @ (rows_ND @ self._omega_DK)).double().cpu()

    def axes(self, centre_D: Tensor, rows: int, most: int) -> tuple[Tensor, float]:
        """At most so many, [D, R] float32, and the share of Σλ² in them; of the rows about their centre."""
        assert self._shift_D is not None
        off_D, omega_DK = centre_D - self._shift_D.double().cpu(), self._omega_DK.double().cpu()
        about_DK = self._image_DK - rows * torch.outer(off_D, off_D @ omega_DK)
        image_DK, probes_DK = about_DK.split([SKETCHED, PROBES], 1)
        axes_DR = torch.linalg.svd(image_DK, full_matrices=False).U[:, :most]
        share = (axes_DR.T @ probes_DK).square().sum() / probes_DK.square().sum()
        return axes_DR.float(), float(share.nan_to_num())


def cross(x_LRN: Tensor, y_MSN: Tensor) -> Tensor:
    """Σ x y' of every two layers: [L, M, R, S]."""
    flat = x_LRN.flatten(0, 1) @ y_MSN.flatten(0, 1).T
    return flat.view(*x_LRN.shape[:2], *y_MSN.shape[:2]).transpose(1, 2)


def own(x_LRN: Tensor) -> Tensor:
    """Σ x x' of each layer: [L, R, R]."""
    return x_LRN @ x_LRN.mT


def across_groups(sums: Array) -> Array:
    """Σ k'l' over pairs of different groups, from each group's Σ x y', [G, ..., R, S]: [G + 1, ...].

    Without each group in turn, then over all.
    """
    whole = sums.sum(0)
    within, with_all = (np.einsum("...rs,...rs->...", sums, other) for other in (sums, whole))
    across = np.einsum("...rs,...rs->...", whole, whole) - within.sum(0)
    return np.concatenate([across - 2 * (with_all - within), across[None]])
