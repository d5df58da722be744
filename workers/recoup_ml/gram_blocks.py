"""Gram blocks of a batch: which panels of whole texts meet, and their inner products, a row a layer.

Pairs inside a panel are left out. Blocks of one shape that follow one another are one batched product.

Axes: L layers, N tokens, D width, R directions, B blocks of H by W tokens, P token pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Gram blocks of one shape, side by side: rows of H tokens, each with the W tokens that follow them."""

    start: int
    blocks: int
    height: int
    width: int

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, ...] into [B, H, ...] and [B, W, ...], without a copy."""
        size = self.height + self.width
        here = tokens[self.start : self.start + self.blocks * size].unflatten(0, (self.blocks, size))
        return here[:, : self.height], here[:, self.height :]


def every_two(text_N: Tensor, panels: int) -> list[Run]:
    """Of so many panels at most, each with each other."""
    return [run for level in _by_halves([_panels(text_N, panels)]) for run in _alike(level)]


def couples(text_N: Tensor, meets: int) -> list[Run]:
    """Of panels of about so many tokens, at most half of all, each with one other."""
    bounds = _panels(text_N, 2 * max(1, round(len(text_N) / (2 * meets))))
    return _alike([(bounds[at], bounds[at + 1], bounds[at + 2]) for at in range(0, len(bounds) - 2, 2)])


def gram_rows(
    layers: Iterable[Tensor], axes: Sequence[Tensor], runs: Sequence[Run]
) -> tuple[Tensor, list[Tensor]]:
    """The Gram blocks, one row a layer, [L, P], and each layer's states in its directions, [R, N].

    A layer is done with before the next is made, while it is in the processor's cache.
    """
    rows, inside = [], []
    for layer, state_ND in enumerate(layers):
        splits = [run.split(state_ND) for run in runs]
        rows.append(torch.cat([torch.bmm(first, second.mT).flatten() for first, second in splits]))
        if axes:
            inside.append(axes[layer].T.to(state_ND) @ state_ND.T)
    return torch.stack(rows), inside


def inside_rows(states_LRN: Tensor, runs: Sequence[Run]) -> Tensor:
    """The same of states inside the principal directions, of all layers at once: [L, P]."""
    states_NLR = states_LRN.permute(2, 0, 1)
    return torch.cat(
        [torch.einsum("bhlr,bwlr->lbhw", *run.split(states_NLR)).flatten(1) for run in runs], dim=1
    )


def pairs_kept(kept_N: Tensor, runs: Sequence[Run]) -> Tensor:
    """For each pair in the order of `gram_rows`, whether both tokens count: [P]."""
    splits = [run.split(kept_N) for run in runs]
    return torch.cat([(first[:, :, None] & second[:, None]).flatten() for first, second in splits])


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


def _by_halves(parts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Every two panels once, level by level: rows from the first to the second with those up to the third.

    Blocks as square as can be are what a matrix product is fastest at.
    """
    parts = [bounds for bounds in parts if len(bounds) > 2]
    if parts:
        yield [(bounds[0], bounds[len(bounds) // 2], bounds[-1]) for bounds in parts]
        halves = [(bounds[: len(bounds) // 2 + 1], bounds[len(bounds) // 2 :]) for bounds in parts]
        yield from _by_halves([half for pair in halves for half in pair])


def _alike(places: Sequence[tuple[int, int, int]]) -> list[Run]:
    """As one run where all have one shape and follow one another, or as runs of one block."""
    runs = [Run(start, 1, middle - start, end - middle) for start, middle, end in places]
    follow = all(before[2] == after[0] for before, after in pairwise(places))
    if runs and follow and len({(run.height, run.width) for run in runs}) == 1:
        return [Run(runs[0].start, len(runs), runs[0].height, runs[0].width)]
    return runs
