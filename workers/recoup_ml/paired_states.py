"""The states of two models at the same tokens: which tokens are looked at, and what is read there.

Tokens are drawn before a model runs, so that every model is read at the same ones, and a text that is run
again is read where it was. Nothing is kept beyond the batch.

Axes: B texts of a batch, T token positions, N chosen tokens, D width, L layers with the embeddings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.hidden import capture
from recoup_ml.models import last_hidden
from recoup_ml.principal import WORTHWHILE, Sketch

OUTLIER = 10.0
"""Times the median norm of a layer."""


@dataclass(frozen=True)
class Chosen:
    """A batch and the tokens of it that are looked at."""

    ids_BT: Tensor
    mask_BT: Tensor
    chosen_BT: Tensor
    text_N: Tensor
    """Which text of the batch each chosen token is of."""
    first_N: Tensor
    """True on the first token of a text."""

    @property
    def texts(self) -> int:
        return len(self.ids_BT)


def choose(batch: Mapping[str, Tensor], most: int, generator: torch.Generator) -> Chosen:
    """Draws at most `most` tokens of each text among those that are not padding, or of its completion.

    Raises:
        ValueError: the masks do not fit, or there is one text only.
    """
    ids_BT = batch["input_ids"].cpu()
    mask_BT = batch.get("attention_mask", torch.ones_like(ids_BT)).cpu().bool()
    counts_BT = mask_BT & batch.get("completion_mask", mask_BT).cpu().bool()
    if ids_BT.dim() != 2 or len(ids_BT) < 2 or not ids_BT.shape == mask_BT.shape == counts_BT.shape:
        raise ValueError(
            f"A batch is input_ids [B, T] with masks of that shape and B of 2 or more; these are "
            f"{tuple(ids_BT.shape)}, {tuple(mask_BT.shape)} and {tuple(counts_BT.shape)}."
        )
    lot_BT = torch.rand(ids_BT.shape, generator=generator).masked_fill(~counts_BT, 2.0)
    rank_BT = lot_BT.argsort(1).argsort(1)
    chosen_BT = (rank_BT < most) & counts_BT
    first_BT = torch.zeros_like(mask_BT).scatter(1, mask_BT.int().argmax(1, keepdim=True), value=True)
    return Chosen(ids_BT, mask_BT, chosen_BT, chosen_BT.nonzero()[:, 0], first_BT[chosen_BT])


@torch.inference_mode()
def read(model: PreTrainedModel, chosen: Chosen) -> list[Tensor]:
    """The residual stream at the chosen tokens, before the first block and after each: [N, D] float32."""
    device = model.device
    with capture(model, device) as seen:
        seen.positions_BT = chosen.chosen_BT.to(device)
        last_hidden(model, chosen.ids_BT.to(device), chosen.mask_BT.long().to(device))
    return seen.states()


@dataclass(frozen=True)
class Frame:
    """Where the states of one model lie, layer by layer: what they are centred and scaled by."""

    centres: list[Tensor]
    """[D] each."""
    sizes: list[float]
    """Root mean square about the centre."""
    medians: list[float]
    """Norm of an ordinary token."""
    axes: list[Tensor]
    """Principal directions, [D, R] each; none where the spectra are flat."""

    def placed(self, states: list[Tensor]) -> Iterator[Tensor]:
        """Centred in float32, of unit size; made layer by layer."""
        for state, centre, size in zip(states, self.centres, self.sizes, strict=True):
            yield (state - centre.to(state)) / size

    def ordinary(self, states: list[Tensor]) -> Tensor:
        """True on tokens without a massive activation in any layer, [N]."""
        norms = zip(states, self.medians, strict=True)
        return torch.stack([state.norm(dim=1) <= OUTLIER * median for state, median in norms]).all(0)


@dataclass(frozen=True)
class Frames:
    """Of both models. Sums that were made in one pair of frames may be added."""

    student: Frame
    teacher: Frame

    def same(self, other: "Frames") -> bool:
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are saved."""
        found = {}
        for name, frame in (("student", self.student), ("teacher", self.teacher)):
            rows = zip(frame.centres, frame.sizes, frame.medians, strict=True)
            for layer, (centre, size, median) in enumerate(rows):
                found[f"{name}.{layer:04d}"] = torch.cat([centre, torch.tensor([size, median])])
            found |= {f"axes.{name}.{layer:04d}": axes_DR for layer, axes_DR in enumerate(frame.axes)}
        return found

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Frames":
        def frame(name: str) -> Frame:
            rows = [tensors[key] for key in sorted(tensors) if key.startswith(name)]
            axes = [tensors[key] for key in sorted(tensors) if key.startswith(f"axes.{name}")]
            sizes, medians = ([float(row[at]) for row in rows] for at in (-2, -1))
            return Frame([row[:-2] for row in rows], sizes, medians, axes)

        return Frames(frame("student"), frame("teacher"))


class Pilot:
    """Gathers a frame from the first texts; massive activations do not enter."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[float] = []
        self._norms: list[list[Tensor]] = []
        self._tokens: list[int] = []
        self._sketches: list[Sketch] = []

    def add(self, states: list[Tensor]) -> None:
        if not self._sums:
            self._sums = [torch.zeros(state.shape[1], dtype=torch.float64) for state in states]
            self._squares, self._tokens = [0.0] * len(states), [0] * len(states)
            self._norms = [[] for _ in states]
            self._sketches = [Sketch(state.shape[1]) for state in states]
        for layer, state in enumerate(states):
            norm_N = state.norm(dim=1)
            ordinary = state[norm_N <= OUTLIER * norm_N.median()]
            self._sketches[layer].add(ordinary)
            ordinary = ordinary.double().cpu()
            self._sums[layer] += ordinary.sum(0)
            self._squares[layer] += float(ordinary.square().sum())
            self._tokens[layer] += len(ordinary)
            self._norms[layer].append(norm_N.cpu())

    @property
    def layers(self) -> int:
        return len(self._sums)

    def frame(self, most_axes: int) -> Frame:
        """With at most so many principal directions of a layer."""
        centres = [total / count for total, count in zip(self._sums, self._tokens, strict=True)]
        sizes = []
        for centre, square, count in zip(centres, self._squares, self._tokens, strict=True):
            about = square / count - float(centre.square().sum())
            sizes.append(max(about / len(centre), 0.0) ** 0.5 or 1.0)
        medians = [float(torch.cat(norms).median()) for norms in self._norms]
        axes, shares = zip(
            *(
                sketch.axes(centre, count, most_axes)
                for sketch, centre, count in zip(self._sketches, centres, self._tokens, strict=True)
            ),
            strict=True,
        )
        worthwhile = most_axes > 0 and sum(shares) >= WORTHWHILE * len(shares)
        return Frame([centre.float() for centre in centres], sizes, medians, list(axes) if worthwhile else [])
