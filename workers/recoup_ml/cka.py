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

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml import hsic, models
from recoup_ml.geometry import Geometry, GeometrySums
from recoup_ml.hidden import decoder_blocks
from recoup_ml.hsic import Array, Interval, Products
from recoup_ml.hsic_sums import Batch, Sums, batch_sums
from recoup_ml.paired_states import Chosen, Frames, Pilot, choose, read
from recoup_ml.pooled import Pooled, pool

Tokens = Mapping[str, Tensor]
"""`input_ids` [B, T]; `attention_mask` where there is padding; `completion_mask` where only part counts."""
LayerMap = Sequence[tuple[int, int]]
ESTIMATORS = {
    False: "linear CKA over tokens of different texts, fixed centre; jackknife over groups of texts",
    True: "linear CKA over texts (mean states), debiased: pairs across groups; jackknife over groups",
}
"""By whether texts are pooled."""
COUNTS = ("texts", "tokens", "dropped_first", "dropped_outliers")
FACTS = ("layer_map", "pilot_texts", "positions_sha256")
FEW_TEXTS, FEWEST_GROUPS = 64, 5


@dataclass(frozen=True)
class Alignment:
    """Two models compared. Layers count from the embeddings, 0; the last is -1."""

    sums: Sums | Pooled
    layer_map: tuple[tuple[int, int], ...]
    """(student, teacher) layers that correspond."""
    texts: int
    tokens: int
    dropped_first: int
    """Tokens left out as the first of their text."""
    dropped_outliers: int
    """Tokens left out for a massive activation in any layer of either model."""
    pilot_texts: int
    """Texts that the centre of every layer comes from."""
    distances: tuple[GeometrySums, ...]
    ceiling_sums: Sums | Pooled | None
    floor_sums: Sums | Pooled | None
    frames: Frames
    """What the states were centred and scaled by: given to `align` for other texts, sums may be added."""
    positions_sha256: str
    """Of which tokens of which texts were compared."""

    def __add__(self, other: "Alignment") -> "Alignment":
        """Of one model pair over both parts of a corpus, the second compared in the frames of the first.

        Raises:
            ValueError: the parts are not of one frame, one layer map and one way of comparing.
        """
        if self._likeness() != other._likeness() or not self.frames.same(other.frames):
            raise ValueError(
                "Alignments add if both were measured alike, in the frames of one pilot: give `align` of the "
                "second part `pilot=first.frames`."
            )
        both = hashlib.sha256((self.positions_sha256 + other.positions_sha256).encode())
        return replace(
            self,
            sums=_joined(self.sums, other.sums),
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            distances=tuple(a + b for a, b in zip(self.distances, other.distances, strict=True)),
            ceiling_sums=_joined(self.ceiling_sums, other.ceiling_sums),
            floor_sums=_joined(self.floor_sums, other.floor_sums),
            positions_sha256=both.hexdigest(),
        )

    def save(self, path: str | Path) -> None:
        """All of it, as safetensors; `load` gives it back, to be read or added to."""
        parts = {"sums": self.sums, "ceiling": self.ceiling_sums, "floor": self.floor_sums}
        tensors = {f"frames.{name}": tensor for name, tensor in self.frames.tensors().items()}
        for part, sums in parts.items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in sums.tensors().items()} if sums else {}
        content = {name: getattr(self, name) for name in (*COUNTS, *FACTS)}
        content |= {"pooled": self.pooled, "distances": [vars(sums) for sums in self.distances]}
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            path,
            {"alignment": json.dumps(content)},
        )

    @staticmethod
    def load(path: str | Path) -> "Alignment":
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["alignment"])
        tensors, kind = load_file(path), Pooled if content["pooled"] else Sums

        def part(name: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")
            }

        return Alignment(
            sums=kind.of(part("sums")),
            **{name: content[name] for name in (*COUNTS, "pilot_texts", "positions_sha256")},
            layer_map=tuple((mine, theirs) for mine, theirs in content["layer_map"]),
            distances=tuple(
                GeometrySums(**row | {"norms": tuple(row["norms"])}) for row in content["distances"]
            ),
            ceiling_sums=kind.of(part("ceiling")) if part("ceiling") else None,
            floor_sums=kind.of(part("floor")) if part("floor") else None,
            frames=Frames.of(part("frames")),
        )

    @property
    def pooled(self) -> bool:
        """Whether points are texts, not tokens."""
        return isinstance(self.sums, Pooled)

    @property
    def geometry(self) -> tuple[Geometry, ...]:
        """Of corresponding layers: how far apart their states are, in the basis that the two share."""
        return tuple(sums.geometry() for sums in self.distances)

    @property
    def ceiling(self) -> tuple[float, ...] | None:
        """Of corresponding layers: the teacher with itself after a round trip through bfloat16."""
        return _control(self.ceiling_sums, [(theirs, theirs) for _, theirs in self.layer_map])

    @property
    def floor(self) -> tuple[float, ...] | None:
        """Of corresponding layers: with the states of other tokens, or texts."""
        return _control(self.floor_sums, self.layer_map)

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the numbers worth less."""
        pilot = FEW_TEXTS if self.pooled else self.pilot_texts
        return tuple(_problems(self.sums.products(), self.layer_map, pilot))

    @property
    def matrix(self) -> Array:
        """CKA of every student layer with every teacher layer; NaN where a self-product is not positive."""
        return hsic.matrix(self.sums.products())

    def interval(self, student: int, teacher: int) -> Interval:
        """One entry of the matrix with its standard error and 95 % interval."""
        return _interval(self.sums.products(), student, teacher)

    @property
    def diagonal(self) -> list[Interval]:
        """Of corresponding layers."""
        products = self.sums.products()
        return [_interval(products, student, teacher) for student, teacher in self.layer_map]

    @property
    def with_outliers(self) -> list[float]:
        """Of corresponding layers: what CKA would be if no token had been dropped."""
        return [float(value) for value in np.diag(hsic.matrix(self.sums.products_with_all()))]

    def rows(self) -> list[dict[str, float | int]]:
        """A row for each pair of corresponding layers: all that is known of it."""
        controls = [
            {"ceiling": _at(self.ceiling, index), "floor": _at(self.floor, index)}
            for index in range(len(self.layer_map))
        ]
        return [
            {"student": student, "teacher": teacher, "cka": found.value, "low": found.low, "high": found.high}
            | {"se": found.se, "with_outliers": outliers}
            | control
            | vars(geometry)
            for (student, teacher), found, outliers, control, geometry in zip(
                self.layer_map, self.diagonal, self.with_outliers, controls, self.geometry, strict=True
            )
        ]

    def to_json(self) -> str:
        """Everything; null where a number is undefined."""
        counts = {
            name: getattr(self, name) for name in ("texts", "tokens", "dropped_first", "dropped_outliers")
        }
        content = {"estimator": ESTIMATORS[self.pooled], **counts, "problems": self.problems}
        return json.dumps(
            content
            | {"layers": [_finite(row) for row in self.rows()]}
            | {"matrix": [[value if math.isfinite(value) else None for value in row] for row in self.matrix]},
            indent=1,
        )

    def to_csv(self) -> str:
        """The rows of corresponding layers."""
        buffer, rows = io.StringIO(), self.rows()
        writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def _likeness(self) -> tuple[object, ...]:
        return self.layer_map, self.pooled, self.ceiling_sums is None, self.floor_sums is None

    def plot(self, path: str | Path) -> None:
        """Heat map of all layer pairs and curve of corresponding ones, as PNG or SVG by the path's suffix."""
        from recoup_ml import alignment, plots  # they are heavy, and know this module

        picture = alignment.shown(self)
        if Path(path).suffix == ".svg":
            Path(path).write_text(plots.alignment_svg(picture), "utf-8")
        else:
            Path(path).write_bytes(plots.alignment_png(picture))


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
    first, frames = ([], pilot) if isinstance(pilot, Frames) else _pilot(trio, supply, pilot)
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


def _pilot(trio: _Trio, supply: Iterable[Chosen], texts: int) -> tuple[list[Chosen], Frames]:
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
    return first, Frames(mine.frame(), theirs.frame())


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
        for (student, teacher), sums in zip(self.layer_map, self._geometry, strict=True):
            sums.add(mine[student][kept_N], theirs[teacher][kept_N])
        x, y = self.frames.student.placed(mine), self.frames.teacher.placed(theirs)
        text_N = chosen.text_N.to(device)
        self._sums = self._added(self._sums, Batch(x, y, text_N, kept_N), group)
        if trio.rounded is not None:
            again = [state.to(device) for state in read(trio.rounded, chosen)]
            own = tuple((teacher, teacher) for _, teacher in self.layer_map)
            z = self.frames.teacher.placed(again)
            self._ceiling = self._added(self._ceiling, Batch(z, y, text_N, kept_N), group, own)
            if self.pooled:
                return
            other_N = torch.randperm(len(text_N), generator=self._draw).to(device)
            away = [state[other_N] for state in x]
            both_N = kept_N & kept_N[other_N]
            self._floor = self._added(self._floor, Batch(away, y, text_N, both_N), group)

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

    def _added(
        self, sums: Sums | Pooled | None, batch: Batch, group: int, layer_map: LayerMap = ()
    ) -> Sums | Pooled:
        mapped = layer_map or self.layer_map
        if self.pooled:
            return _joined(sums, pool(batch, mapped, self.groups))
        return _joined(sums, batch_sums(batch, mapped, group, self.groups))


def _joined(a: Any, b: Any) -> Any:
    """What there is of both, added."""
    return b if a is None else a if b is None else a + b


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


def _interval(products: Products, student: int, teacher: int) -> Interval:
    """NaN around the value where fewer than five groups hold pairs."""
    value = float(hsic.matrix(products)[student, teacher])
    if products.groups < FEWEST_GROUPS:
        return Interval(value, math.nan, math.nan, math.nan)
    left_out = [
        float(hsic.matrix(products.without(group))[student, teacher]) for group in range(products.groups)
    ]
    return hsic.jackknife(value, left_out, hsic.t_975(products.groups - 1))


def _control(sums: Sums | Pooled | None, layer_map: LayerMap) -> tuple[float, ...] | None:
    if sums is None:
        return None
    matrix = hsic.matrix(sums.products())
    return tuple(float(matrix[mine, theirs]) for mine, theirs in layer_map)


def _problems(products: Products, layer_map: LayerMap, pilot: int) -> list[str]:
    found = []
    if products.groups < FEWEST_GROUPS:
        found.append(
            f"{products.groups} batches in groups of their own: intervals need {FEWEST_GROUPS} or more."
        )
    if pilot < FEW_TEXTS:
        found.append(f"The centre of every layer comes from {pilot} texts alone, which ties tokens together.")
    for name, own, layers in (
        ("student", products.xx_KL[-1], [mine for mine, _ in layer_map]),
        ("teacher", products.yy_KM[-1], [theirs for _, theirs in layer_map]),
    ):
        empty = [layer for layer in layers if not own[layer] > 0]
        if empty:
            listed = ", ".join(map(str, empty))
            found.append(f"CKA is undefined for the {name}'s layers {listed}: their states do not vary.")
    return found


def _at(values: tuple[float, ...] | None, index: int) -> float:
    return math.nan if values is None else values[index]


def _finite(row: Mapping[str, float | int]) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
