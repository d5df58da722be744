"""How far two layers' states are apart as they are, in the basis that a student shares with its teacher.

CKA forgives any rotation. A student descends from its teacher, so distances in the shared basis mean
something too, and see more (Davari et al. 2022, arXiv 2210.16156, ask for more than one measure).

Axes: N tokens, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Over all tokens that count; NaN where the widths differ."""

    relative_l2: float
    """√(Σ‖s - t‖² / Σ‖t‖²)."""
    cosine: float
    """Mean cosine of a token's two states."""
    student_norm: float
    """Mean norm."""
    teacher_norm: float


@dataclass
class GeometrySums:
    apart: float = 0.0
    teacher: float = 0.0
    cosine: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    tokens: int = 0

    def __add__(self, other: "GeometrySums") -> "GeometrySums":
        norms = self.norms[0] + other.norms[0], self.norms[1] + other.norms[1]
        return GeometrySums(
            self.apart + other.apart,
            self.teacher + other.teacher,
            self.cosine + other.cosine,
            norms,
            self.tokens + other.tokens,
        )

    def add(self, student_ND: Tensor, teacher_ND: Tensor) -> None:
        sums = [student_ND.norm(dim=1).sum(), teacher_ND.norm(dim=1).sum()]
        if alike := student_ND.shape == teacher_ND.shape:
            sums += [
                (student_ND - teacher_ND).double().square().sum(),
                teacher_ND.double().square().sum(),
                torch.cosine_similarity(student_ND, teacher_ND).sum(),
            ]
        # read together: a device is waited for at each reading
        mine, theirs, *apart = torch.stack([value.double() for value in sums]).tolist()
        self.norms = self.norms[0] + mine, self.norms[1] + theirs
        self.tokens += len(teacher_ND)
        if not alike:
            self.apart = self.cosine = math.nan
            return
        self.apart, self.teacher, self.cosine = (
            sum(pair) for pair in zip((self.apart, self.teacher, self.cosine), apart, strict=True)
        )

    def geometry(self) -> Geometry:
        count = self.tokens or math.nan
        relative = math.sqrt(self.apart / self.teacher) if self.teacher else math.nan
        return Geometry(relative, self.cosine / count, self.norms[0] / count, self.norms[1] / count)
