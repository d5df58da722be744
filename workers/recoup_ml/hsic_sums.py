"""HSIC of all layer pairs of two models, added up batch by batch, in memory that does not grow with the text.

With a fixed centre for each layer, HSIC is the mean of k(a, b) l(a, b) over pairs of tokens of
*different* texts (k and l the inner products of their states in either model): no diagonal, no pair
inside a text, no correction term. A batch is cut into panels of whole texts; the Gram blocks of
pairs of panels are laid out as one row a layer, and one matrix product of those rows gives all layer
pairs. Pairs inside a panel are left out, which costs precision and no bias.

Where a batch names the principal directions of its layers, all pairs count inside of those (`principal.py`),
and the Gram blocks for what lies outside: few are enough, so a token meets those of one other panel. Without
directions a token meets every panel.

A centre must come from many texts (`cka.py` takes it from a pilot of a few hundred): the mean of a
batch would tie its tokens together. Products are float32 of states of unit size, sums float64, kept by
jackknife group. Sums over the same frame add: over batches, processes, machines.

Axes: L, M layers of either model, N tokens, D width, P token pairs, G groups, K pairs of the layer map,
R, S principal directions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from recoup_ml.gram_blocks import Run, couples, every_two, gram_rows, inside_rows, pairs_kept
from recoup_ml.hsic import Array, Products
from recoup_ml.principal import across_groups, cross, own

PANELS = 8
"""Of a batch without principal directions."""
MEETS = 128
"""Tokens of another panel that a token meets at most in Gram blocks, where there are principal directions."""


@dataclass(frozen=True)
class Sums:
    """By jackknife group; `all_` counts tokens that the others leave out, too."""

    xy_GLM: Array
    """Σ k(a, b) l(a, b) over the pairs of Gram blocks."""
    xx_GL: Array
    yy_GM: Array
    pairs_G: Array
    near_xy_GLM: Array
    """The same inside the principal directions; 0 without any."""
    near_xx_GL: Array
    near_yy_GM: Array
    inside_xy_GLMRS: Array
    """Σ x y' of every two layers, inside their principal directions."""
    inside_xx_GLRR: Array
    inside_yy_GMSS: Array
    tokens_G: Array
    all_xy_GK: Array
    all_xx_GK: Array
    all_yy_GK: Array

    def __add__(self, other: "Sums") -> "Sums":
        """Of both; they must be of one frame, or the sum means nothing."""
        return Sums(*(a + b for a, b in zip(self._arrays(), other._arrays(), strict=True)))

    def products(self) -> Products:
        """Without each group that holds pairs in turn, then over all."""
        return Products(
            self._means(self.xy_GLM, self.near_xy_GLM, self.inside_xy_GLMRS),
            self._means(self.xx_GL, self.near_xx_GL, self.inside_xx_GLRR),
            self._means(self.yy_GM, self.near_yy_GM, self.inside_yy_GMSS),
            int((self.pairs_G > 0).sum()),
        )

    def products_with_all(self) -> Products:
        """The same of the layer map alone, on its diagonal, over all tokens; a common factor is left in."""
        xy_GKK = np.apply_along_axis(np.diag, 1, self.all_xy_GK)
        there = self.pairs_G > 0
        sides = (_left_out(side[there]) for side in (xy_GKK, self.all_xx_GK, self.all_yy_GK))
        return Products(*sides, int(there.sum()))

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are saved."""
        return {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Sums":
        """Files from before there were principal directions name none."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        groups, mine, theirs = arrays["xy_GLM"].shape
        return Sums(**_without_directions(groups, mine, theirs) | arrays)

    def _arrays(self) -> list[Array]:
        return [getattr(self, field.name) for field in fields(self)]

    def _means(self, blocks: Array, near: Array, inside: Array) -> Array:
        """Over Gram blocks, less what is inside the principal directions, plus that over all pairs."""
        there = np.append(self.pairs_G > 0, True)
        blocks, near, pairs = (_left_out(part)[there] for part in (blocks, near, self.pairs_G))
        every = across_groups(inside)[there] + 2 * near
        every_pair = across_groups(self.tokens_G[:, None, None])[there] + 2 * pairs
        aligned = (slice(None), *(None,) * (blocks.ndim - 1))
        return (blocks - near) / np.maximum(pairs, 1.0)[aligned] + every / np.maximum(every_pair, 1.0)[
            aligned
        ]


@dataclass(frozen=True)
class Batch:
    """The tokens of one batch, in the order of their texts."""

    x_LND: Iterable[Tensor]
    """Centred states, one [N, D] a layer, of about unit size; read once, so they may be made one by one."""
    y_MND: Iterable[Tensor]
    text_N: Tensor
    """Which text each token is of; tokens of a text lie together."""
    kept_N: Tensor
    """False on tokens that only `with_all` counts."""
    x_axes: Sequence[Tensor] = ()
    """The principal directions of each layer, [D, R]; without those of both models, none are used."""
    y_axes: Sequence[Tensor] = ()


@torch.inference_mode()
def batch_sums(
    batch: Batch,
    layer_map: Sequence[tuple[int, int]],
    group: int,
    groups: int,
    meets: int = MEETS,
    into: Sums | None = None,
) -> Sums:
    """The sums of one batch, all of it in one group; added to `into`, which is changed, if that is given.

    Args:
        meets: tokens of another text that a token meets in Gram blocks, at most half the batch; where there
            are principal directions. Time grows with it, and the error falls.

    Raises:
        ValueError: the batch holds one text only, so that no pair is of different texts.
    """
    directions = bool(batch.x_axes and batch.y_axes)
    runs = couples(batch.text_N, meets) if directions else every_two(batch.text_N, PANELS)
    if not runs:
        raise ValueError("A batch needs the tokens of at least two texts.")
    x_LP, x_inside = gram_rows(batch.x_LND, batch.x_axes if directions else (), runs)
    y_MP, y_inside = gram_rows(batch.y_MND, batch.y_axes if directions else (), runs)
    found = _over_blocks(x_LP, y_MP, pairs_kept(batch.kept_N, runs), layer_map)
    if directions:
        found |= _inside(torch.stack(x_inside), torch.stack(y_inside), batch.kept_N, runs)
    else:
        found |= {name: part[0] for name, part in _without_directions(1, len(x_LP), len(y_MP)).items()}
    whole = into or Sums(**{name: np.zeros((groups, *np.shape(part))) for name, part in found.items()})
    for name, part in found.items():
        getattr(whole, name)[group] += part
    return whole


def _without_directions(groups: int, mine: int, theirs: int) -> dict[str, Array]:
    return {
        "near_xy_GLM": np.zeros((groups, mine, theirs)),
        "near_xx_GL": np.zeros((groups, mine)),
        "near_yy_GM": np.zeros((groups, theirs)),
        "inside_xy_GLMRS": np.zeros((groups, mine, theirs, 0, 0)),
        "inside_xx_GLRR": np.zeros((groups, mine, 0, 0)),
        "inside_yy_GMSS": np.zeros((groups, theirs, 0, 0)),
        "tokens_G": np.zeros(groups),
    }


def _over_blocks(
    x_LP: Tensor, y_MP: Tensor, kept_P: Tensor, layer_map: Sequence[tuple[int, int]]
) -> dict[str, Array]:
    """Of every two layers over tokens that are kept, of the layer map over all; the rows are changed."""
    mine, theirs = zip(*layer_map, strict=True)
    x_KP, y_KP = _named(x_LP, mine), _named(y_MP, theirs)
    found = {"all_xy_GK": _dot(x_KP, y_KP), "all_xx_GK": _dot(x_KP, x_KP), "all_yy_GK": _dot(y_KP, y_KP)}
    if not kept_P.all():
        x_LP[:, ~kept_P] = y_MP[:, ~kept_P] = 0.0
    found |= {"xy_GLM": _array(x_LP @ y_MP.T), "xx_GL": _dot(x_LP, x_LP), "yy_GM": _dot(y_MP, y_MP)}
    return found | {"pairs_G": _array(kept_P.sum())}


def _inside(x_LRN: Tensor, y_MSN: Tensor, kept_N: Tensor, runs: Sequence[Run]) -> dict[str, Array]:
    """Inside the principal directions: of all tokens, and over the pairs of the Gram blocks."""
    x_LRN, y_MSN = x_LRN * kept_N, y_MSN * kept_N
    x_LP, y_MP = inside_rows(x_LRN, runs), inside_rows(y_MSN, runs)
    return {
        "near_xy_GLM": _array(x_LP @ y_MP.T),
        "near_xx_GL": _dot(x_LP, x_LP),
        "near_yy_GM": _dot(y_MP, y_MP),
        "inside_xy_GLMRS": _array(cross(x_LRN, y_MSN)),
        "inside_xx_GLRR": _array(own(x_LRN)),
        "inside_yy_GMSS": _array(own(y_MSN)),
        "tokens_G": _array(kept_N.sum()),
    }


def _named(rows_LP: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The rows of these layers; without a copy where they are all of them, in order."""
    return rows_LP if layers == tuple(range(len(rows_LP))) else rows_LP[list(layers)]


def _dot(a_LP: Tensor, b_LP: Tensor) -> Array:
    return _array(torch.linalg.vecdot(a_LP, b_LP))


def _array(found: Tensor) -> Array:
    array: Array = found.double().cpu().numpy()
    return array


def _left_out(sums_G: Array) -> Array:
    """Without each group in turn, then over all: [G + 1, ...]."""
    whole = sums_G.sum(0)
    return np.concatenate([whole - sums_G, whole[None]])
