"""HSIC of all layer pairs of two models, added up batch by batch, in memory that does not grow with the text.

With a fixed centre for each layer, HSIC is the mean of k(a, b) l(a, b) over pairs of tokens of
*different* texts (k and l the inner products of their states in either model): no diagonal, no pair
inside a text, no correction term. A batch is cut into panels of whole texts; the Gram blocks of
every two panels are laid out as one row a layer, and one matrix product of those rows gives all layer
pairs. Pairs inside a panel are left out, which costs precision and no bias.

A centre must come from many texts (`cka.py` takes it from a pilot of a few hundred): the mean of a
batch would tie its tokens together. Products are float32 of states of unit size, sums float64, kept by
jackknife group. Sums over the same frame add: over batches, processes, machines.

Axes: L, M layers of either model, N tokens, D width, P token pairs, G groups, K pairs of the layer map, R, S
principal axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recoup_ml.hsic import Array, Products
from recoup_ml.principal import cross, own, projected

PANELS = 8


@dataclass(frozen=True)
class Sums:
    """By jackknife group; `with_all` counts tokens that the others leave out, too."""

    xy_GLM: Array
    """Σ k(a, b) l(a, b) over the pairs of Gram blocks, less what of it lies in the principal axes."""
    xx_GL: Array
    yy_GM: Array
    pairs_G: Array
    axes_xy_GLRMS: Array
    """Σ x y' of every two layers, in their principal axes."""
    axes_xx_GLRR: Array
    axes_yy_GMSS: Array
    near_xy_GLM: Array
    """Σ ‖Σ x y'‖² of each panel by itself: the pairs that do not count."""
    near_xx_GL: Array
    near_yy_GM: Array
    tokens_G: Array
    near_pairs_G: Array
    all_xy_GK: Array
    all_xx_GK: Array
    all_yy_GK: Array

    def __add__(self, other: "Sums") -> "Sums":
        """Of both; they must be of one frame, or the sum means nothing."""
        return Sums(*(a + b for a, b in zip(self._arrays(), other._arrays(), strict=True)))

    def products(self) -> Products:
        """Without each group that holds pairs in turn, then over all."""
        return Products(
            self._means("lrms,lrms->lm", self.xy_GLM, self.axes_xy_GLRMS, self.near_xy_GLM),
            self._means("lrs,lrs->l", self.xx_GL, self.axes_xx_GLRR, self.near_xx_GL),
            self._means("mrs,mrs->m", self.yy_GM, self.axes_yy_GMSS, self.near_yy_GM),
            int((self.pairs_G > 0).sum()),
        )

    def products_with_all(self) -> Products:
        """The same of the layer map alone, on its diagonal, over all tokens; a common factor is left in."""
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

    def _means(self, squares: str, blocks: Array, axes: Array, near: Array) -> Array:
        """Means over pairs of Gram blocks and over pairs of panels, together; `squares` sums up products."""
        parts = (blocks, self.pairs_G, axes, near, self.tokens_G, self.near_pairs_G)
        wholes, found = [part.sum(0) for part in parts], []
        for group in [*np.flatnonzero(self.pairs_G > 0), None]:
            outside, pairs, inside, own_pairs, tokens, few = (
                whole if group is None else whole - part[group]
                for whole, part in zip(wholes, parts, strict=True)
            )
            far = np.einsum(squares, inside, inside) - own_pairs
            found.append(outside / max(pairs, 1.0) + far / max(tokens**2 - few, 1.0))
        return np.array(found)


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
    x_axes: Sequence[Tensor] = ()
    """The principal axes of each layer, [D, R], or none."""
    y_axes: Sequence[Tensor] = ()


@torch.inference_mode()
def batch_sums(
    batch: Batch, layer_map: Sequence[tuple[int, int]], group: int, groups: int, into: Sums | None = None
) -> Sums:
    """The sums of one batch, all of it in one group; added to `into`, which is changed, if that is given.

    Raises:
        ValueError: the batch holds one text only, so that no pair is of different texts.
    """
    bounds = _panels(batch.text_N, 2 if batch.x_axes else PANELS)
    if len(bounds) < 3:
        raise ValueError("A batch needs the tokens of at least two texts.")
    x_NLR = projected(batch.x_LND, batch.x_axes, batch.kept_N)
    y_NMS = projected(batch.y_MND, batch.y_axes, batch.kept_N)
    found = _outside(batch, layer_map, bounds, (x_NLR, y_NMS)) | _inside(x_NLR, y_NMS, batch.kept_N, bounds)
    whole = into or Sums(**{name: np.zeros((groups, *np.shape(part))) for name, part in found.items()})
    for name, part in found.items():
        getattr(whole, name)[group] += part
    return whole


def _outside(
    batch: Batch, layer_map: Sequence[tuple[int, int]], bounds: Sequence[int], inside: tuple[Tensor, Tensor]
) -> dict[str, Array | float]:
    """From the Gram blocks: of all directions less those inside, and of the layer map over all tokens."""
    x_LP, y_MP = _gram_rows(batch.x_LND, bounds), _gram_rows(batch.y_MND, bounds)
    mine, theirs = zip(*layer_map, strict=True)
    x_KP, y_KP = _named(x_LP, mine), _named(y_MP, theirs)
    found: dict[str, Array | float] = {
        f"all_{name}_GK": _dot(a_KP, b_KP)
        for name, a_KP, b_KP in (("xy", x_KP, y_KP), ("xx", x_KP, x_KP), ("yy", y_KP, y_KP))
    }
    kept_P = _pairs_kept(batch.kept_N, bounds)
    if not batch.kept_N.all():
        x_LP[:, ~kept_P] = y_MP[:, ~kept_P] = 0.0
    xy, xx, yy = _every_two(x_LP, y_MP)
    if batch.x_axes:
        rows = [_gram_rows(states_NLR.unbind(1), bounds) for states_NLR in inside]
        xy, xx, yy = (a - b for a, b in zip((xy, xx, yy), _every_two(*rows), strict=True))
    return found | {"xy_GLM": xy, "xx_GL": xx, "yy_GM": yy, "pairs_G": float(kept_P.sum())}


def _inside(x_NLR: Tensor, y_NMS: Tensor, kept_N: Tensor, bounds: Sequence[int]) -> dict[str, Array | float]:
    """In the principal axes, of all panels and of each by itself."""
    found: dict[str, Array | float] = {}
    for start, end in pairwise(bounds):
        x, y, tokens = x_NLR[start:end], y_NMS[start:end], float(kept_N[start:end].sum())
        xy, xx, yy = cross(x, y), own(x), own(y)
        parts: dict[str, Array | float] = {
            "axes_xy_GLRMS": _array(xy),
            "axes_xx_GLRR": _array(xx),
            "axes_yy_GMSS": _array(yy),
            "near_xy_GLM": _array(xy.square().sum((1, 3))),
            "near_xx_GL": _array(xx.square().sum((1, 2))),
            "near_yy_GM": _array(yy.square().sum((1, 2))),
            "tokens_G": tokens,
            "near_pairs_G": tokens**2,
        }
        found = {name: found.get(name, 0.0) + part for name, part in parts.items()}
    return found


def _panels(text_N: Tensor, most: int) -> list[int]:
    """Where panels of whole texts begin, and where the last one ends; at most so many, of like size."""
    _, sizes = torch.unique_consecutive(text_N, return_counts=True)
    ends, total = sizes.cumsum(0).tolist(), len(text_N)
    bounds, panels = [0], min(most, len(ends))
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


def _every_two(x_LP: Tensor, y_MP: Tensor) -> tuple[Array, Array, Array]:
    return _array(x_LP @ y_MP.T), _dot(x_LP, x_LP), _dot(y_MP, y_MP)


def _dot(a_LP: Tensor, b_LP: Tensor) -> Array:
    return _array(torch.linalg.vecdot(a_LP, b_LP))


def _array(found: Tensor) -> Array:
    return found.double().cpu().numpy()


def _left_out(xy_GLM: Array, xx_GL: Array, yy_GM: Array, pairs_G: Array) -> Products:
    there = pairs_G > 0
    sides = [side[there] for side in (xy_GLM, xx_GL, yy_GM)]
    leaving = [np.concatenate([side.sum(0) - side, side.sum(0)[None]]) for side in sides]
    return Products(*leaving, int(there.sum()))
