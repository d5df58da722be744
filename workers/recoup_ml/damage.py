"""What the weights say happened to a student: zeros, levels, missing layers and channels, distance.

The tensors of both models are read one pair at a time from their safetensors files, so a
model of any size is inspected in the memory of its largest tensor. Kinds are told apart by
marks that each damage leaves: pruning leaves exact zeros, narrower matrices or fewer layers,
quantization a config entry or few distinct levels, fine-tuning none of these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recoup.schemas import Damage, DamageReport
from recoup_ml import models, packed
from recoup_ml.errors import IncompatibleModels
from recoup_ml.marks import WINDOW, Marks, distance, few_levels, marks, zero_shares
from recoup_ml.packed import PlainWeights
from recoup_ml.weights import BLOCK, block_of

LayerMap = list[tuple[int, int]]
Pattern = Literal["none", "unstructured", "2:4"]

FEW_ZEROS, FEW_ZEROS_OF_A_GRID = 0.02, 0.45
"""Less than this is no pruning. Zero is often one of few levels: of 3-bit weights a third may be zero."""


def inspect(student: Path, teacher: Path) -> DamageReport:
    """Compares the weights in two model folders.

    Raises:
        IncompatibleModels: no tensor of the student has its like in the teacher, or the student is
            deeper or wider than its teacher.
    """
    mine, theirs = PlainWeights(student), PlainWeights(teacher)
    depths = models.depth(student), models.depth(teacher)
    layer_map = _layer_map(mine, theirs, depths)
    found = list(_compare(mine, theirs, dict(layer_map)))
    if not any(mark.squared_norm for mark in found):
        raise IncompatibleModels(f"{student.name} and {teacher.name} share no tensor of one name and shape.")
    linear = [mark for mark in found if mark.block is not None]
    grid = _Grid(packed.method(student), few_levels(linear))
    cut = _cut(linear, depths[1] - depths[0], grid.found)
    unread = grid.method is not None and not _all_read(mine, theirs, layer_map)
    total = None if unread else distance(found)
    return DamageReport(
        kind=_kind(cut, grid, total),
        evidence=[_distance_evidence(total, cut), *cut.evidence(), *grid.evidence()],
        weight_distance=total,
        zero_fraction=cut.zeros,
        zero_pattern=cut.pattern,
        missing_layers=cut.layers,
        layer_map=layer_map,
        distance_by_layer=[
            distance([mark for mark in linear if mark.block == layer]) for layer in range(depths[0])
        ],
    )


@dataclass(frozen=True)
class _Grid:
    """The signs of quantization."""

    method: str | None
    """As `config.json` names it."""
    levels: tuple[float, float] | None
    """Of the student and of its teacher, where the student's are few."""

    @property
    def found(self) -> bool:
        return self.method is not None or self.levels is not None

    def evidence(self) -> Iterator[str]:
        if self.method is not None:
            yield f"The config names the quantization method {self.method}."
        if self.levels is not None:
            yield (
                f"{WINDOW} neighbouring weights take {self.levels[0]:.0f} distinct values, "
                f"{self.levels[1]:.0f} in the teacher."
            )


@dataclass(frozen=True)
class _Cut:
    """The signs of pruning."""

    zeros: float
    pattern: Pattern
    layers: int
    """How many are missing."""
    channels: list[tuple[int, int]]
    """Inner widths of the blocks that are less than the teacher's: (here, there)."""

    @property
    def found(self) -> bool:
        return self.pattern != "none" or self.layers > 0 or bool(self.channels)

    def evidence(self) -> Iterator[str]:
        if self.pattern != "none":
            yield f"{self.zeros:.1%} of the linear weights are exactly zero ({self.pattern})."
        if self.layers:
            yield f"{self.layers} of the teacher's decoder layers are missing."
        for here, there in self.channels:
            yield f"{1 - here / there:.1%} of the blocks' inner channels are gone ({here} of {there} left)."


def _cut(linear: Sequence[Marks], layers: int, grid: bool) -> _Cut:
    zeros, teacher_zeros = zero_shares(linear)
    pattern: Pattern = "none"
    if zeros - teacher_zeros >= (FEW_ZEROS_OF_A_GRID if grid else FEW_ZEROS):
        pattern = "2:4" if all(mark.two_of_four for mark in linear) else "unstructured"
    return _Cut(zeros, pattern, layers, sorted({pair for mark in linear for pair in mark.narrowed}))


def _kind(cut: _Cut, grid: _Grid, total: float | None) -> Damage | Literal["none"]:
    if cut.found:
        return "pruning"
    if grid.found:
        return "quantization"
    return "finetuning" if total else "none"


def _distance_evidence(total: float | None, cut: _Cut) -> str:
    if total is None:
        return "Only their quantizer can read the packed weights; their distance to the teacher is not known."
    where = "The weights lie" if not cut.channels else "Where the shapes agree, the weights lie"
    return f"{where} {total:.2%} of the teacher's norm away from it."


def _compare(student: PlainWeights, teacher: PlainWeights, layer_map: dict[int, int]) -> Iterator[Marks]:
    for name in student:
        block = block_of(name)
        twin = name if block is None else _renumbered(name, layer_map[block])
        if twin not in teacher:
            continue
        mine, theirs = student[name], teacher[twin]
        if block is not None and any(
            here > there for here, there in zip(mine.shape, theirs.shape, strict=False)
        ):
            sizes = f"{tuple(mine.shape)}, larger than its teacher's {tuple(theirs.shape)}"
            raise IncompatibleModels(f"The student's {name} is {sizes}.")
        yield marks(mine, theirs, block if mine.dim() == 2 else None)


def _all_read(student: PlainWeights, teacher: PlainWeights, layer_map: LayerMap) -> bool:
    """Whether everything in the teacher's blocks can be read in the student's."""
    places = {theirs: mine for mine, theirs in layer_map}
    blocks = ((name, block_of(name)) for name in teacher)
    return all(_renumbered(name, places[layer]) in student for name, layer in blocks if layer in places)


def _layer_map(student: PlainWeights, teacher: PlainWeights, depths: tuple[int, int]) -> LayerMap:
    """Which teacher layer each student layer was: by the nearest landmark, in order."""
    if depths[0] > depths[1]:
        raise IncompatibleModels(f"The student has {depths[0]} layers, more than its teacher's {depths[1]}.")
    if depths[0] == depths[1]:
        return [(layer, layer) for layer in range(depths[0])]
    name = _landmark(student, teacher)
    mine = [student[_renumbered(name, layer)] for layer in range(depths[0])]
    theirs = [teacher[_renumbered(name, layer)] for layer in range(depths[1])]
    spare, place, pairs = depths[1] - depths[0], 0, []
    for layer, weight in enumerate(mine):
        choices = range(place, layer + spare + 1)
        nearest = min(choices, key=lambda other: float((weight - theirs[other]).norm()))
        pairs.append((layer, nearest))
        place = nearest + 1
    return pairs


def _landmark(student: PlainWeights, teacher: PlainWeights) -> str:
    """A weight of the first block that has one shape in both: a matrix, or else a vector."""
    both = [name for name in sorted(student) if block_of(name) == 0 and name in teacher]
    alike = [name for name in both if student[name].shape == teacher[name].shape]
    if not alike:
        raise IncompatibleModels(
            "The student is shallower, and no weight of its blocks has the shape of its teacher's: "
            "its layers cannot be told apart."
        )
    return max(alike, key=lambda name: student[name].dim())


def _renumbered(name: str, layer: int) -> str:
    return BLOCK.sub(lambda found: found[0].replace(found[1], str(layer)), name, count=1)
