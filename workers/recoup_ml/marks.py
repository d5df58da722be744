"""What damage leaves on one tensor, next to the healthy one: distance, zeros, few levels, lost channels.

Quantization leaves few distinct values in every small window of a row, and the same ones again
and again; pruning leaves zeros, and all other values distinct.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

WINDOW, SAMPLED_WINDOWS = 32, 512
FEW_LEVELS, FEWER = 16, 0.9
"""At most so many of 32 values are few; fewer than the teacher has is less than this share of its own."""


@dataclass(frozen=True)
class Marks:
    """What one tensor of the student shows, and its teacher's."""

    block: int | None
    """The decoder block whose matrix this is; none for vectors and for what stands outside the blocks."""
    squared_distance: float
    squared_norm: float
    """Of the teacher's tensor; both are 0 where the shapes differ."""
    size: int
    zeros: int
    teacher_size: int
    teacher_zeros: int
    two_of_four: bool
    levels: float
    """Distinct values in 32 neighbours, the median."""
    teacher_levels: float
    fewer_values: bool
    """Values that are not zero come again more often than in the teacher."""
    narrowed: tuple[tuple[int, int], ...]
    """Channels (here, in the teacher), of each axis that has fewer of them here."""


def marks(mine: Tensor, theirs: Tensor, block: int | None) -> Marks:
    alike = mine.shape == theirs.shape
    levels, distinct = _levels(mine)
    teacher_levels, teacher_distinct = _levels(theirs)
    return Marks(
        block=block,
        squared_distance=float((mine - theirs).double().square().sum()) if alike else 0.0,
        squared_norm=float(theirs.double().square().sum()) if alike else 0.0,
        size=mine.numel(),
        zeros=int((mine == 0).sum()),
        teacher_size=theirs.numel(),
        teacher_zeros=int((theirs == 0).sum()),
        two_of_four=_is_two_of_four(mine),
        levels=levels,
        teacher_levels=teacher_levels,
        fewer_values=distinct < FEWER * teacher_distinct,
        narrowed=tuple(pair for pair in zip(mine.shape, theirs.shape, strict=False) if pair[0] < pair[1]),
    )


def few_levels(linear: Sequence[Marks]) -> tuple[float, float] | None:
    """The levels of a quantized student and of its teacher, medians over matrices; None if not quantized."""
    mine = _median([mark.levels for mark in linear])
    theirs = _median([mark.teacher_levels for mark in linear])
    fewer = 2 * sum(mark.fewer_values for mark in linear) > len(linear)
    return (mine, theirs) if mine <= FEW_LEVELS and mine < theirs and fewer else None


def distance(found: Sequence[Marks]) -> float:
    """||W_student - W_teacher|| / ||W_teacher|| over tensors of equal shape (Frobenius)."""
    norm = math.fsum(mark.squared_norm for mark in found)
    return math.sqrt(math.fsum(mark.squared_distance for mark in found) / norm) if norm else 0.0


def zero_shares(linear: Sequence[Marks]) -> tuple[float, float]:
    """The share of exact zeros in the student's matrices, and in their teacher's."""
    size, teacher_size = sum(mark.size for mark in linear), sum(mark.teacher_size for mark in linear)
    if not linear:
        return 0.0, 0.0
    zeros, teacher_zeros = sum(mark.zeros for mark in linear), sum(mark.teacher_zeros for mark in linear)
    return zeros / size, teacher_zeros / teacher_size


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())


def _levels(weight: Tensor) -> tuple[float, float]:
    """In windows of 32 along the rows: distinct values (the median), and distinct ones of those not zero."""
    if weight.dim() != 2 or weight.shape[1] % WINDOW:
        return float(WINDOW), 1.0
    windows = weight.reshape(-1, WINDOW)
    sampled = windows[:: max(1, len(windows) // SAMPLED_WINDOWS)].sort(1).values
    distinct = (sampled.diff(dim=1) != 0).sum(1) + 1
    has_zero, filled = (sampled == 0).any(1), (sampled != 0).sum()
    return float(distinct.median()), float((distinct - has_zero.int()).sum() / filled.clamp_min(1))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float(WINDOW)
