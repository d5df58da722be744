"""Texts as single points: the mean state of a text's tokens, and CKA over texts.

A text's mean is independent of that of another, so n is the number of texts, and small: all pairs of texts of
different groups are used, by the estimator of `hsic.py`, which needs no centre. The means are kept, so memory
grows with the texts (a state of each layer a text), not with their length.

Axes: N tokens, S texts, D width, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recoup_ml import hsic
from recoup_ml.hsic import Products
from recoup_ml.hsic_sums import Batch

FEWEST_TEXTS = 5
SIDES = ("x", "y", "all_x", "all_y")


@dataclass(frozen=True)
class Pooled:
    """What `hsic_sums.Sums` is for tokens: adds up, and is saved by its tensors."""

    x: tuple[Tensor, ...]
    """One [S, D] a layer of the student."""
    y: tuple[Tensor, ...]
    all_x: tuple[Tensor, ...]
    """Of the layer map alone, over all tokens, those that are dropped elsewhere too."""
    all_y: tuple[Tensor, ...]
    groups: int
    """Of the jackknife; texts are dealt to them in turn."""

    def __add__(self, other: "Pooled") -> "Pooled":
        """Of both one after the other."""
        joined = (
            tuple(torch.cat(pair) for pair in zip(getattr(self, side), getattr(other, side), strict=True))
            for side in SIDES
        )
        return Pooled(*joined, self.groups)

    def products(self) -> Products:
        return self._products

    def products_with_all(self) -> Products:
        return _products(self.all_x, self.all_y, self.groups)

    def shuffled(self) -> "Pooled":
        """With the student's states of other texts."""
        order_S = torch.randperm(len(self.x[0]), generator=torch.Generator().manual_seed(0))
        return Pooled(tuple(layer[order_S] for layer in self.x), self.y, self.all_x, self.all_y, self.groups)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{side}.{at:04d}": layer for side in SIDES for at, layer in enumerate(getattr(self, side))}
        return named | {"groups": torch.tensor(self.groups)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Pooled":
        def side(name: str) -> tuple[Tensor, ...]:
            return tuple(tensors[key] for key in sorted(tensors) if key.startswith(f"{name}."))

        return Pooled(*map(side, SIDES), int(tensors["groups"]))

    @cached_property
    def _products(self) -> Products:
        return _products(self.x, self.y, self.groups)


def pool(batch: Batch, layer_map: Sequence[tuple[int, int]], groups: int) -> Pooled:
    """The texts of one batch; a text of which no token is kept is left out."""
    everything_N = torch.ones_like(batch.kept_N)
    x_LND, y_MND = list(batch.x_LND), list(batch.y_MND)
    return Pooled(
        x=_means(x_LND, batch.text_N, batch.kept_N),
        y=_means(y_MND, batch.text_N, batch.kept_N),
        all_x=_means([x_LND[mine] for mine, _ in layer_map], batch.text_N, everything_N),
        all_y=_means([y_MND[theirs] for _, theirs in layer_map], batch.text_N, everything_N),
        groups=groups,
    )


def _means(layers: Sequence[Tensor], text_N: Tensor, kept_N: Tensor) -> tuple[Tensor, ...]:
    _, text_N = torch.unique(text_N[kept_N], return_inverse=True)
    sizes_S1 = torch.bincount(text_N).unsqueeze(1)
    empty = (layer.new_zeros(len(sizes_S1), layer.shape[1]) for layer in layers)
    return tuple(
        (sums_SD.index_add_(0, text_N, layer[kept_N]) / sizes_S1).cpu()
        for sums_SD, layer in zip(empty, layers, strict=True)
    )


def _products(x: Sequence[Tensor], y: Sequence[Tensor], groups: int) -> Products:
    texts = len(x[0])
    if texts < FEWEST_TEXTS:
        raise ValueError(f"Pooled CKA compares texts, and {texts} are left; give {FEWEST_TEXTS} or more.")
    return hsic.products(x, y, torch.arange(texts) % min(groups, texts))
