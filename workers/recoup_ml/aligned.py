"""What a comparison of two models' layers found: sums of it, to be read, added, kept and drawn.

Axes: B texts of a batch, L layers with the embeddings, D width.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recoup_ml import hsic
from recoup_ml.geometry import Geometry, GeometrySums
from recoup_ml.hsic import Array, Interval, Products
from recoup_ml.hsic_sums import Sums
from recoup_ml.paired_states import Frames
from recoup_ml.pooled import Pooled

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
            sums=joined(self.sums, other.sums),
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            distances=tuple(a + b for a, b in zip(self.distances, other.distances, strict=True)),
            ceiling_sums=joined(self.ceiling_sums, other.ceiling_sums),
            floor_sums=joined(self.floor_sums, other.floor_sums),
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


def joined(a: Any, b: Any) -> Any:
    """What there is of both, added."""
    return b if a is None else a if b is None else a + b


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
