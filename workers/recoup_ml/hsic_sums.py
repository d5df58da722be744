"""HSIC of all layer pairs of two models, added up batch by batch, in memory that does not grow with the text.

With a fixed centre for each layer, HSIC is the mean of k(a, b) l(a, b) over pairs of tokens of
*different* texts (k and l the inner products of their states in either model): no diagonal, no pair
inside a text, no correction term. A batch is cut into panels of whole texts; the Gram blocks of
every two panels are laid out as one row a layer, and one matrix product of those rows gives all layer
pairs. Pairs inside a panel are left out, which costs precision and no bias.

A centre must come from many texts (`cka.py` takes it from a pilot of a few hundred): the mean of a
batch would tie its tokens together. Products are float32 of states of unit size, sums float64, kept by
jackknife group. Sums over the same frame add: over batches, processes, machines.

Axes: L, M layers of either model, N tokens, D width, P token pairs, G groups, K pairs of the layer map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from recoup_ml.hsic import Array, Products

PANELS = 8


@dataclass(frozen=True)
class Sums:
    """Over token pairs, by jackknife group; `with_all` counts tokens that the others leave out, too."""

    xy_GLM: Array
    xx_GL: Array
    yy_GM: Array
    pairs_G: Array
    all_xy_GK: Array
    all_xx_GK: Array
    all_yy_GK: Array

    def __add__(self, other: "Sums") -> "Sums":
        """Of both; they must be of one frame, or the sum means nothing."""
        return Sums(*(a + b for a, b in zip(self._arrays(), other._arrays(), strict=True)))

    def products(self) -> Products:
        """Without each group that holds pairs in turn, then over all; a common factor is left in."""
        return _left_out(self.xy_GLM, self.xx_GL, self.yy_GM, self.pairs_G)

    def products_with_all(self) -> Products:
        """The same of the layer map alone, on its diagonal, over all tokens."""
        xy_GKK = np.apply_along_axis(np.diag, 1, self.all_xy_GK)
        return _left_out(xy_GKK, self.all_xx_GK, self.all_yy_GK, self.pairs_G)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are saved."""
        return {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Sums":
        return Sums(**{name: tensor.numpy() for name, tensor in tensors.items()})

    def _arrays(self) -> list[Array]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Batch:
    """The tokens of one batch, in the order of their texts."""

    x_LND: list[Tensor]
    """Centred states, one [N, D] a layer, of about unit size."""
    y_MND: list[Tensor]
    text_N: Tensor
    """Which text each token is of; tokens of a text lie together."""
    kept_N: Tensor
    """False on tokens that only `with_all` counts."""


@torch.inference_mode()
def batch_sums(batch: Batch, layer_map: Sequence[tuple[int, int]], group: int, groups: int) -> Sums:
    """The sums of one batch, all of it in one group.

    Raises:
        ValueError: it holds one text only, so that no pair is of different texts.
    """
    bounds = _panels(batch.text_N)
    if len(bounds) < 3:
        raise ValueError("A batch needs the tokens of at least two texts.")
    x_LP, y_MP = _gram_rows(batch.x_LND, bounds), _gram_rows(batch.y_MND, bounds)
    mine, theirs = zip(*layer_map, strict=True)
    x_KP, y_KP = _named(x_LP, mine), _named(y_MP, theirs)
    every = [_dot(x_KP, y_KP), _dot(x_KP, x_KP), _dot(y_KP, y_KP)]
    if not batch.kept_N.all():
        lost_P = ~_pairs_kept(batch.kept_N, bounds)
        x_LP[:, lost_P] = y_MP[:, lost_P] = 0.0
    found = Sums(
        xy_GLM=(x_LP @ y_MP.T).double().cpu().numpy()[None],
        xx_GL=_dot(x_LP, x_LP)[None],
        yy_GM=_dot(y_MP, y_MP)[None],
        pairs_G=np.array([float(_pairs_kept(batch.kept_N, bounds).sum())]),
        all_xy_GK=every[0][None],
        all_xx_GK=every[1][None],
        all_yy_GK=every[2][None],
    )
    return _placed(found, group, groups)


def _placed(found: Sums, group: int, groups: int) -> Sums:
    def spread(array: Array) -> Array:
        whole = np.zeros((groups, *array.shape[1:]))
        whole[group] = array[0]
        return whole

    return Sums(*(spread(array) for array in found._arrays()))


def _panels(text_N: Tensor) -> list[int]:
    """Where panels of whole texts begin, and where the last one ends; at most `PANELS`, of like size."""
    _, sizes = torch.unique_consecutive(text_N, return_counts=True)
    ends, total = sizes.cumsum(0).tolist(), len(text_N)
    bounds, panels = [0], min(PANELS, len(ends))
    for end, following in zip(ends, [*ends[1:], total], strict=True):
        wanted = total * len(bounds) / panels
        if len(bounds) < panels and abs(end - wanted) <= abs(following - wanted):
            bounds.append(end)
    return [*bounds, total] if bounds[-1] < total else bounds


def _gram_rows(layers: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    """The Gram blocks of every two panels, one row a layer: [L, P]."""
    places = _blocks(bounds)
    shapes = [(middle - start, end - middle) for start, middle, end in places]
    rows_LP = layers[0].new_empty(len(layers), sum(height * width for height, width in shapes))
    for row_P, state_ND in zip(rows_LP, layers, strict=True):
        blocks = row_P.split([height * width for height, width in shapes])
        for block, shape, (start, middle, end) in zip(blocks, shapes, places, strict=True):
            torch.mm(state_ND[start:middle], state_ND[middle:end].T, out=block.view(shape))
    return rows_LP


def _blocks(bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Every two panels once, by halves: rows from the first to the second with rows from there to the third.

    Blocks as square as can be are what a matrix product is fastest at.
    """
    if len(bounds) < 3:
        return []
    half = len(bounds) // 2
    return [
        (bounds[0], bounds[half], bounds[-1]),
        *_blocks(bounds[: half + 1]),
        *_blocks(bounds[half:]),
    ]


def _pairs_kept(kept_N: Tensor, bounds: Sequence[int]) -> Tensor:
    """For each pair in the order of `_gram_rows`, whether both tokens count: [P]."""
    return torch.cat(
        [
            (kept_N[start:middle, None] & kept_N[None, middle:end]).flatten()
            for start, middle, end in _blocks(bounds)
        ]
    )


def _named(rows_LP: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The rows of these layers; without a copy where they are all of them, in order."""
    return rows_LP if layers == tuple(range(len(rows_LP))) else rows_LP[list(layers)]


def _dot(a_LP: Tensor, b_LP: Tensor) -> Array:
    return torch.linalg.vecdot(a_LP, b_LP).double().cpu().numpy()


def _left_out(xy_GLM: Array, xx_GL: Array, yy_GM: Array, pairs_G: Array) -> Products:
    there = pairs_G > 0
    sides = [side[there] for side in (xy_GLM, xx_GL, yy_GM)]
    leaving = [np.concatenate([side.sum(0) - side, side.sum(0)[None]]) for side in sides]
    return Products(*leaving, int(there.sum()))
