"""Alignment and recovery along a training: does the one rise as the other does?

At validation, and between if asked, one pass over the validation prompts gives both the token KL to the
teacher and the student's hidden states, whose CKA with the teacher's is taken at a few positions: the same
ones throughout, without those that had a massive activation in the teacher or in the student at the start.

A few points of one run show how two curves went, and no cause: they follow one another, so intervals of
their rank correlation are too narrow if anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup.schemas import AlignmentPoint, RankCorrelation, Trajectory
from recoup_ml import hsic
from recoup_ml.alignment import Positions, diagonal, ordinary
from recoup_ml.observation import Observation, observe
from recoup_ml.rank_correlation import kendall, spearman
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered

MOST_POSITIONS = 1024
"""Of validation: CKA at so many costs a few hundredths of the pass that reads them."""
FEWEST_GROUPS = 5


@dataclass
class Recorder:
    """Looks at a student while it trains, and keeps what it saw."""

    every: int
    """Steps between two looks."""
    sequences: Sequence[Answered]
    """The teacher's answers to validation prompts."""
    teacher: Observation
    """As observed on them, with its states at `positions`."""
    positions: Positions
    layer_map: Sequence[tuple[int, int]]
    """(student, teacher) layers that correspond, embeddings first."""
    pad_id: int
    points: list[AlignmentPoint] = field(default_factory=list)
    _stay_N: Tensor | None = None

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def look(self, student: PreTrainedModel, step: int) -> float:
        """Mean token KL of the student, nats; its alignment is noted beside it."""
        seen = observe(student, self.sequences, self.pad_id, self.positions)
        kl = compare(self.teacher, seen, self.sequences).mean_kl
        found_L = self._cka(seen.states)
        mean = float(np.nanmean(found_L)) if np.isfinite(found_L).any() else math.nan
        self.points.append(
            AlignmentPoint(
                step=step, validation_kl=_finite(kl), mean=_finite(mean), last=_finite(float(found_L[-1]))
            )
        )
        return kl

    def state(self) -> dict[str, Any]:
        """What it saw, as plain JSON."""
        stay = None if self._stay_N is None else self._stay_N.tolist()
        return {"points": [point.model_dump() for point in self.points], "stay": stay}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes a new recorder, made alike, to where another one was."""
        self.points = [AlignmentPoint(**point) for point in state["points"]]
        self._stay_N = None if state["stay"] is None else torch.tensor(state["stay"])

    def trajectory(self) -> Trajectory:
        return Trajectory(
            positions=0 if self._stay_N is None else int(self._stay_N.sum()),
            sequences=len(self.sequences),
            dropped_outliers=0 if self._stay_N is None else int((~self._stay_N).sum()),
            positions_sha256=self.positions.sha256,
            points=self.points,
            correlations=[correlation(self.points, "mean"), correlation(self.points, "last")],
        )

    def _cka(self, states: list[Tensor]) -> hsic.Array:
        """Of corresponding layers; NaN where the model's numbers, or the groups of sequences, do not do."""
        if self._stay_N is None:
            self._stay_N = ordinary([self.teacher.states, states])
        groups_N = self.positions.groups[self._stay_N]
        finite = all(bool(state.isfinite().all()) for state in states)
        if len(groups_N.unique()) < FEWEST_GROUPS or not finite:
            return np.full(len(self.layer_map), np.nan)
        _, groups_N = torch.unique(groups_N, return_inverse=True)
        sides = ([state[self._stay_N] for state in side] for side in (states, self.teacher.states))
        return diagonal(hsic.products(*sides, groups_N), self.layer_map)


def correlation(points: Sequence[AlignmentPoint], alignment: str) -> RankCorrelation:
    """Of the `mean` alignment, or that of the `last` layer, with recovery: minus the KL."""
    pairs = [
        (value, -point.validation_kl)
        for point in points
        for value in [getattr(point, alignment)]
        if value is not None and point.validation_kl is not None
    ]
    x, y = [value for value, _ in pairs], [recovery for _, recovery in pairs]
    return RankCorrelation.model_validate(
        {"alignment": alignment, "n": len(pairs), "spearman": spearman(x, y), "kendall": kendall(x, y)}
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
