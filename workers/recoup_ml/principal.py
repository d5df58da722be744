"""The few directions in which most of a layer varies: HSIC within them, over all pairs of tokens.

Spectra of hidden states fall fast, and HSIC weighs by squared eigenvalues. In `AXES` directions a sum over
all pairs of tokens costs no Gram matrix: Σ k(a, b) l(a, b) = ‖Σ x_a y_a'‖², from which the pairs inside a
panel of texts, ‖Σ_panel x_a y_a'‖², are taken off. What lies outside of these directions, kl - k'l', is
estimated by the Gram blocks of `hsic_sums.py`. Both are unbiased whatever the directions; good ones make the
second small. Where a spectrum is flat nothing is gained, and the standard error says so.

Axes: N tokens, D width, L, M layers of either model, R (and S) directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

AXES = 16


class Sketch:
    """Gathers the directions from rows that come in parts: the range of (Σ x x') Ω for a random Ω.

    One pass of the range finder of Halko, Martinsson and Tropp 2011 (arXiv 0909.4061).
    """

    def __init__(self, width: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self._omega_DR = torch.randn(width, min(AXES, width), generator=draw, dtype=torch.float64)
        self._image_DR = torch.zeros_like(self._omega_DR)

    def add(self, rows_ND: Tensor) -> None:
        self._image_DR += rows_ND.T @ (rows_ND @ self._omega_DR.to(rows_ND))

    def axes(self, centre_D: Tensor, rows: int) -> Tensor:
        """[D, R] float32, orthonormal: of the rows about their centre, of how many there were."""
        about_DR = self._image_DR - rows * torch.outer(centre_D, centre_D @ self._omega_DR)
        return torch.linalg.qr(about_DR).Q.float()


def projected(layers: Sequence[Tensor], axes: Sequence[Tensor], kept_N: Tensor) -> Tensor:
    """States in the directions of their layers, 0 where not kept: [N, L, R]; without axes R is 0."""
    first, size = layers[0], axes[0].shape[1] if axes else 0
    found_NLR = first.new_zeros(len(first), len(layers), size)
    for layer, (state_ND, axes_DR) in enumerate(zip(layers, axes, strict=False)):
        torch.mm(state_ND, axes_DR.to(state_ND), out=found_NLR[:, layer])
    found_NLR[~kept_N] = 0.0
    return found_NLR


def cross(x_NLR: Tensor, y_NMS: Tensor) -> Tensor:
    """Σ x y' of every two layers: [L, R, M, S]."""
    flat = x_NLR.flatten(1).T @ y_NMS.flatten(1)
    return flat.view(*x_NLR.shape[1:], *y_NMS.shape[1:])


def own(x_NLR: Tensor) -> Tensor:
    """Σ x x' of each layer: [L, R, R]."""
    x_LNR = x_NLR.transpose(0, 1)
    return x_LNR.mT @ x_LNR
