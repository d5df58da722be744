"""What the weights say happened to a student: zeros, levels, missing layers, distance.

The tensors of both models are read one pair at a time from their safetensors files, so a
model of any size is inspected in the memory of its largest tensor. Kinds are told apart by
marks that each damage leaves: pruning leaves exact zeros or fewer layers, quantization a
config entry or few distinct levels in every small window of a row, fine-tuning neither.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from recoup.schemas import DamageReport
from recoup_ml import models
from recoup_ml.errors import IncompatibleModels
from recoup_ml.weights import BLOCK, Weights, block_of

WINDOW, FEW_LEVELS, SAMPLED_WINDOWS = 32, 16, 512
MIN_ZEROS = 0.02


@dataclass(frozen=True)
class _Marks:
    """What one student tensor and its teacher's show."""

    block: int | None
    squared_distance: float
    squared_norm: float
    size: int
    zeros: int
    teacher_zeros: int
    two_of_four: bool
    levels: float
    teacher_levels: float


def inspect(student: Path, teacher: Path) -> DamageReport:
    """Compares the weights in two model folders.

    Raises:
        IncompatibleModels: no tensor of the student has its like in the teacher.
    """
    depths = models.depth(student), models.depth(teacher)
    layer_map = _layer_map(student, teacher, depths)
    marks = list(_compare(Weights(student), Weights(teacher), dict(layer_map)))
    if not marks:
        raise IncompatibleModels(f"{student.name} and {teacher.name} share no tensor of one name and shape.")
    linear = [mark for mark in marks if mark.block is not None]
    zeros = _share(linear, "zeros")
    pruned = zeros - _share(linear, "teacher_zeros") >= MIN_ZEROS
    pattern = "none" if not pruned else "2:4" if all(mark.two_of_four for mark in linear) else "unstructured"
    distance = _distance(marks)
    missing = depths[1] - depths[0]
    levels = _median([mark.levels for mark in linear]), _median([mark.teacher_levels for mark in linear])
    quantized = _quantization_method(student)
    evidence = _evidence(distance, zeros if pruned else 0.0, pattern, missing, levels, quantized)
    if pruned or missing:
        kind = "pruning"
    elif quantized or (levels[0] <= FEW_LEVELS and levels[0] < levels[1]):
        kind = "quantization"
    else:
        kind = "finetuning" if distance > 0 else "none"
    return DamageReport(
        kind=kind,
        evidence=evidence,
        weight_distance=distance,
        zero_fraction=zeros,
        zero_pattern=pattern,
        missing_layers=missing,
        layer_map=layer_map,
        distance_by_layer=[_distance([m for m in linear if m.block == b]) for b in range(depths[0])],
    )


def _compare(student: Weights, teacher: Weights, layer_map: dict[int, int]) -> Iterator[_Marks]:
    for name in student:
        block = block_of(name)
        twin = name if block is None else _renumbered(name, layer_map[block])
        if twin not in teacher:
            continue
        mine, theirs = student[name].float(), teacher[twin].float()
        if mine.shape == theirs.shape:
            yield _marks(mine, theirs, block if mine.dim() == 2 else None)


def _marks(mine: Tensor, theirs: Tensor, block: int | None) -> _Marks:
    return _Marks(
        block=block,
        squared_distance=float((mine - theirs).double().square().sum()),
        squared_norm=float(theirs.double().square().sum()),
        size=mine.numel(),
        zeros=int((mine == 0).sum()),
        teacher_zeros=int((theirs == 0).sum()),
        two_of_four=_is_two_of_four(mine),
        levels=_levels(mine),
        teacher_levels=_levels(theirs),
    )


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())


def _levels(weight: Tensor) -> float:
    """The median number of distinct values in windows of 32 along the rows."""
    if weight.dim() != 2 or weight.shape[1] % WINDOW:
        return float(WINDOW)
    windows = weight.reshape(-1, WINDOW)
    sampled = windows[:: max(1, len(windows) // SAMPLED_WINDOWS)].sort(1).values
    return float(((sampled.diff(dim=1) != 0).sum(1) + 1).median())


def _layer_map(student: Path, teacher: Path, depths: tuple[int, int]) -> list[tuple[int, int]]:
    """Which teacher layer each student layer was: by the nearest first matrix, in order."""
    if depths[0] > depths[1]:
        raise IncompatibleModels(f"The student has {depths[0]} layers, more than its teacher's {depths[1]}.")
    if depths[0] == depths[1]:
        return [(layer, layer) for layer in range(depths[0])]
    mine, theirs = _first_matrices(student, depths[0]), _first_matrices(teacher, depths[1])
    if mine[0].shape != theirs[0].shape:
        raise IncompatibleModels(
            "The student is both shallower and narrower: its layers cannot be told apart."
        )
    spare, place, pairs = depths[1] - depths[0], 0, []
    for layer, weight in enumerate(mine):
        choices = range(place, layer + spare + 1)
        nearest = min(choices, key=lambda other: float((weight - theirs[other]).norm()))
        pairs.append((layer, nearest))
        place = nearest + 1
    return pairs


def _first_matrices(folder: Path, depth: int) -> list[Tensor]:
    weights = Weights(folder)
    names: dict[int, str] = {}
    for name in sorted(weights):
        block = block_of(name)
        if block is not None and name.endswith("weight") and weights[name].dim() == 2:
            names.setdefault(block, name)
    return [weights[names[layer]].float() for layer in range(depth)]


def _renumbered(name: str, layer: int) -> str:
    return BLOCK.sub(lambda found: found[0].replace(found[1], str(layer)), name, count=1)


def _quantization_method(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text())
    return (config.get("quantization_config") or {}).get("quant_method")


def _distance(marks: list[_Marks]) -> float:
    norm = math.fsum(mark.squared_norm for mark in marks)
    return math.sqrt(math.fsum(mark.squared_distance for mark in marks) / norm) if norm else 0.0


def _share(marks: list[_Marks], what: str) -> float:
    size = sum(mark.size for mark in marks)
    return sum(getattr(mark, what) for mark in marks) / size if size else 0.0


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float(WINDOW)


def _evidence(
    distance: float, zeros: float, pattern: str, missing: int, levels: tuple[float, float], method: str | None
) -> list[str]:
    found = [f"The weights lie {distance:.2%} of the teacher's norm away from it."]
    if zeros:
        found.append(f"{zeros:.1%} of the linear weights are exactly zero ({pattern}).")
    if missing:
        found.append(f"{missing} of the teacher's decoder layers are missing.")
    if method:
        found.append(f"The config names the quantization method {method}.")
    if levels[0] <= FEW_LEVELS and levels[0] < levels[1] and not zeros:
        found.append(
            f"{WINDOW} neighbouring weights take {levels[0]:.0f} distinct values, "
            f"{levels[1]:.0f} in the teacher."
        )
    return found
