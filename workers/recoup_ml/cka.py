"""How alike two language models are inside, layer by layer, on the same text.

    from recoup_ml import cka

    found = cka.align(student, teacher, batches)      # batches: what a tokenizer returns, as tensors
    found.matrix                                      # [student layers, teacher layers], embeddings first
    found.interval(-1, -1)                            # value, low, high and standard error
    found.plot("alignment.svg")

Linear CKA without the errors that it usually has on language models: padding and first positions count
nowhere, positions with massive activations are dropped from every layer of both models (Sun et al. 2024,
arXiv 2402.17762), tokens of one text are never compared with each other, states are centred before
they are rounded, and every value has a standard error, by leaving out groups of texts. Nothing is
clamped: what is undefined is NaN, and `problems` says why. Memory does not grow with the text.

Axes: B texts of a batch, T token positions, N chosen tokens, D width, L layers with the embeddings.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml import models
from recoup_ml.aligned import FEW_TEXTS, Alignment, LayerMap, joined
from recoup_ml.geometry import GeometrySums
from recoup_ml.hidden import decoder_blocks
from recoup_ml.hsic_sums import Batch, Sums, batch_sums
from recoup_ml.paired_states import Chosen, Frames, Pilot, choose, read
from recoup_ml.pooled import Pooled, pool
from recoup_ml.principal import most_axes

Tokens = Mapping[str, Tensor]
"""`input_ids` [B, T]; `attention_mask` where there is padding; `completion_mask` where only part counts."""

__all__ = ["Alignment", "Tokens", "align"]


def align(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Tokens],
    *,
    layer_map: LayerMap | None = None,
    tokens: int = 32,
    pilot: int | Frames = 256,
    groups: int = 32,
    controls: bool = True,
    pooled: bool = False,
    seed: int = 0,
    tick: Callable[[int], None] = lambda _texts: None,
) -> Alignment:
    """Runs both models over the batches and compares their residual streams.

    Args:
        batches: each of two texts or more, in random order: texts of one batch are compared with
            each other. The pilot's are run twice.
        layer_map: corresponding (student, teacher) layers, embeddings 0; by default the same numbers.
        tokens: of each text, chosen at random; what is dropped is dropped from these.
        pilot: texts that a layer's centre and ordinary norm are taken from; or those of an earlier
            comparison, so that the sums of both may be added.
        groups: of the jackknife; each batch goes whole into one.
        pooled: compare texts, each by the mean of its tokens, not tokens; five texts or more.
        controls: also measure ceiling and floor, for a third run and the memory of a third model.
        tick: told how many texts are done.

    Raises:
        ValueError: no batch, a batch of one text, fewer than five texts to pool, or models of different
            depth without a layer map.
        UnsupportedModel: a model's decoder blocks cannot be found.
    """
    mapped = _layer_map(student, teacher, layer_map)
    draw = torch.Generator().manual_seed(seed)
    supply = (choose(batch, tokens, draw) for batch in batches)
    trio = _Trio(student, teacher, _rounded(teacher) if controls else None)
    first, frames = ([], pilot) if isinstance(pilot, Frames) else _pilot(trio, supply, pilot, groups)
    tally = _Tally(frames, mapped, groups, pooled)
    for index, chosen in enumerate(chain(first, supply)):
        tally.add(chosen, trio, index % groups)
        tick(tally.texts)
    return tally.alignment(sum(chosen.texts for chosen in first) or FEW_TEXTS)


@dataclass(frozen=True)
class _Trio:
    student: PreTrainedModel
    teacher: PreTrainedModel
    rounded: PreTrainedModel | None
    """The teacher after a round trip through bfloat16."""


def _pilot(trio: _Trio, supply: Iterable[Chosen], texts: int, groups: int) -> tuple[list[Chosen], Frames]:
    """The first batches, which hold at least so many texts if there are as many, and the frames from them."""
    first: list[Chosen] = []
    mine, theirs = Pilot(), Pilot()
    for chosen in supply:
        first.append(chosen)
        mine.add(read(trio.student, chosen))
        theirs.add(read(trio.teacher, chosen))
        if sum(batch.texts for batch in first) >= texts:
            break
    if not first:
        raise ValueError("There is no batch to compare the models on.")
    axes = most_axes(mine.layers, theirs.layers, groups)
    return first, Frames(mine.frame(axes), theirs.frame(axes))


@dataclass
class _Tally:
    """All that is added up over the batches."""

    frames: Frames
    layer_map: tuple[tuple[int, int], ...]
    groups: int
    pooled: bool
    texts: int = 0
    tokens: int = 0
    first: int = 0
    outliers: int = 0
    _sums: Sums | Pooled | None = None
    _ceiling: Sums | Pooled | None = None
    _floor: Sums | Pooled | None = None
    _geometry: list[GeometrySums] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._geometry = [GeometrySums() for _ in self.layer_map]
        self._hash = hashlib.sha256()
        self._draw = torch.Generator().manual_seed(0)

    def add(self, chosen: Chosen, trio: _Trio, group: int) -> None:
        mine, theirs = read(trio.student, chosen), read(trio.teacher, chosen)
        device = theirs[0].device
        mine = [state.to(device) for state in mine]
        ordinary_N = self.frames.student.ordinary(mine) & self.frames.teacher.ordinary(theirs)
        first_N = chosen.first_N.to(device)
        kept_N = ordinary_N & ~first_N
        self.texts += chosen.texts
        self._hash.update(chosen.ids_BT.numpy().tobytes() + chosen.chosen_BT.numpy().tobytes())
        self.tokens += int(kept_N.sum())
        self.first += int(first_N.sum())
        self.outliers += int((~ordinary_N & ~first_N).sum())
        for (row, column), sums in zip(self.layer_map, self._geometry, strict=True):
            sums.add(mine[row][kept_N], theirs[column][kept_N])
        student, teacher = self.frames.student, self.frames.teacher
        text_N = chosen.text_N.to(device)
        states = Batch(
            student.placed(mine), teacher.placed(theirs), text_N, kept_N, student.axes, teacher.axes
        )
        self._sums = self._added(self._sums, states, group)
        if trio.rounded is not None:
            again = [state.to(device) for state in read(trio.rounded, chosen)]
            own = tuple((column, column) for _, column in self.layer_map)
            states = Batch(teacher.placed(again), teacher.placed(theirs), text_N, kept_N)
            self._ceiling = self._added(self._ceiling, states, group, own)
            if self.pooled:
                return
            other_N = torch.randperm(len(text_N), generator=self._draw).to(device)
            away = (state[other_N] for state in student.placed(mine))
            states = Batch(away, teacher.placed(theirs), text_N, kept_N & kept_N[other_N])
            self._floor = self._added(self._floor, states, group)

    def alignment(self, pilot: int) -> Alignment:
        if self._sums is None:
            raise ValueError("There is no batch to compare the models on.")
        if isinstance(self._sums, Pooled) and self._ceiling:
            self._floor = self._sums.shuffled()
        return Alignment(
            sums=self._sums,
            layer_map=self.layer_map,
            texts=self.texts,
            tokens=self.tokens,
            dropped_first=self.first,
            dropped_outliers=self.outliers,
            pilot_texts=pilot,
            distances=tuple(self._geometry),
            ceiling_sums=self._ceiling,
            floor_sums=self._floor,
            frames=self.frames,
            positions_sha256=self._hash.hexdigest(),
        )

    def _added(self, sums: Any, batch: Batch, group: int, layer_map: LayerMap = ()) -> Sums | Pooled:
        mapped = layer_map or self.layer_map
        if self.pooled:
            return joined(sums, pool(batch, mapped, self.groups))
        return batch_sums(batch, mapped, group, self.groups, into=sums)


def _layer_map(
    student: PreTrainedModel, teacher: PreTrainedModel, given: LayerMap | None
) -> tuple[tuple[int, int], ...]:
    depths = len(decoder_blocks(student)) + 1, len(decoder_blocks(teacher)) + 1
    if given is None:
        if depths[0] != depths[1]:
            raise ValueError(
                f"The student has {depths[0]} layers with its embeddings, the teacher {depths[1]}: give a "
                "layer_map of those that correspond."
            )
        return tuple((layer, layer) for layer in range(depths[0]))
    if not given or any(not (0 <= a < depths[0] and 0 <= b < depths[1]) for a, b in given):
        raise ValueError(f"layer_map must name layers below {depths[0]} and {depths[1]}.")
    return tuple((int(mine), int(theirs)) for mine, theirs in given)


def _rounded(teacher: PreTrainedModel) -> PreTrainedModel:
    rounded = deepcopy(teacher)
    models.round_to_bfloat16(rounded)
    return rounded
