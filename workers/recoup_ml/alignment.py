"""Alignment in a recovery: which positions are compared, and what CKA says before and after.

Compared are positions that predict the teacher's answers on test prompts, at most a few a
sequence, the same ones throughout. A handful of tokens carry massive activations (Sun et al.
2024, arXiv 2402.17762) and would decide any similarity alone, so a position whose norm is
more than ten times its layer's median, in any layer of either model, is dropped from all.
"""

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recoup.schemas import Alignment, AlignmentState, Estimate, LayerDistance
from recoup_ml import aligned, hsic
from recoup_ml.geometry import Geometry, GeometrySums
from recoup_ml.paired_states import OUTLIER
from recoup_ml.sequences import Answered

GROUPS = 16
ESTIMATOR = "linear CKA, debiased: pairs across groups of sequences; jackknife over groups"


@dataclass(frozen=True)
class Positions:
    """The chosen positions: for each sequence, which of its answer positions (from 0)."""

    chosen: tuple[tuple[int, ...], ...]

    @property
    def groups(self) -> Tensor:
        return torch.tensor([row % GROUPS for row, places in enumerate(self.chosen) for _ in places])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(self.chosen).encode()).hexdigest()


@dataclass(frozen=True)
class States:
    """Hidden states of the chosen positions, in the order of the sequences: one [N, D] a layer."""

    teacher: list[Tensor]
    before: list[Tensor]
    after: list[Tensor] | None
    ceiling: list[Tensor]
    """The teacher's after a round trip through bfloat16."""


def choose_positions(sequences: Sequence[Answered], total: int, seed: int) -> Positions:
    """At most `total` answer positions, spread evenly over the sequences, drawn at random within each.

    The sequences are used in their order; position 0 of a sequence never predicts an answer here.
    """
    draw = np.random.default_rng(seed)
    each, more = divmod(total, len(sequences))
    chosen = []
    for index, sequence in enumerate(sequences):
        first = 1 if len(sequence.prompt_ids) == 1 else 0
        places = np.arange(first, len(sequence.answer_ids))
        picked = draw.permutation(places)[: each + (index < more)]
        chosen.append(tuple(int(place) for place in np.sort(picked)))
    return Positions(tuple(chosen))


def align(states: States, positions: Positions, layer_map: Sequence[tuple[int, int]], seed: int) -> Alignment:
    """CKA of the student with the teacher before and after, its ceiling, its floor, and the headroom won.

    Args:
        layer_map: (student, teacher) rows and columns of the diagonal, embeddings first.
    """
    stay_N = ordinary([states.teacher, states.before, states.after or []])
    groups_N = positions.groups[stay_N]
    teacher, student, rounded = (_rows(x, stay_N) for x in (states.teacher, states.before, states.ceiling))
    shuffled_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(groups_N)))
    own_layers = [(column, column) for _, column in layer_map]
    beside = _Beside(states.teacher, stay_N, positions.groups, layer_map)
    before = hsic.products(student, teacher, groups_N)
    after = states.after and hsic.products(_rows(states.after, stay_N), teacher, groups_N)
    ceiling = hsic.products(rounded, teacher, groups_N)
    floor = hsic.products(_rows(student, shuffled_N), teacher, groups_N)
    headroom = _Headroom(before, after, ceiling) if after else None
    return Alignment(
        estimator=ESTIMATOR,
        student_layers=_names(len(student)),
        teacher_layers=_names(len(teacher)),
        layer_map=list(layer_map),
        positions=len(groups_N),
        sequences=len(positions.chosen),
        groups=before.groups,
        dropped_outliers=int((~stay_N).sum()),
        positions_sha256=positions.sha256,
        before=_state(before, layer_map, beside, states.before),
        after=_state(after, layer_map, beside, states.after) if after and states.after else None,
        ceiling=[_finite(value) for value in diagonal(ceiling, own_layers)],
        floor=[_finite(value) for value in diagonal(floor, layer_map)],
        headroom_recovered_last=headroom and headroom.recovered(layer_map[-1:]),
        headroom_recovered_mean=headroom and headroom.recovered(layer_map),
    )


def with_embeddings(decoder_layers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of corresponding decoder layers, from 0, as pairs of states: the embeddings come first."""
    return [(0, 0), *((mine + 1, theirs + 1) for mine, theirs in decoder_layers)]


def ordinary(models: Sequence[Sequence[Tensor]]) -> Tensor:
    """True on positions whose norm is ordinary in every layer of every model, [N]."""
    norms = [layer.norm(dim=1) for model in models for layer in model]
    return torch.stack([norm <= OUTLIER * norm.median() for norm in norms]).all(0)


def diagonal(sums: hsic.Products, layer_map: Sequence[tuple[int, int]]) -> hsic.Array:
    """CKA of corresponding layers."""
    rows, columns = zip(*layer_map, strict=True)
    return hsic.matrix(sums)[list(rows), list(columns)]


def csv_table(alignment: Alignment) -> str:
    """Corresponding layers, one a line: before and after with intervals and distances, ceiling and floor."""
    states = {"before": alignment.before} | ({"after": alignment.after} if alignment.after else {})
    parts = ("value", "low", "high")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    beside = ("relative_l2", "cosine", "student_norm", "teacher_norm")
    measured = [f"{name}_{part}" for name in states for part in (*parts, "with_outliers", *beside)]
    writer.writerow(["student", "teacher", *measured, "ceiling", "floor"])
    for place, (mine, theirs) in enumerate(alignment.layer_map):
        values = [
            value
            for state in states.values()
            for value in (
                *(getattr(state.diagonal[place], part, None) for part in parts),
                state.with_outliers[place],
                *(getattr(state.distances[place], part) for part in beside),
            )
        ]
        names = alignment.student_layers[mine], alignment.teacher_layers[theirs]
        writer.writerow([*names, *values, alignment.ceiling[place], alignment.floor[place]])
    return buffer.getvalue()


def shown(found: aligned.Alignment) -> Alignment:
    """Two models that were compared outside a recovery, as a report has it."""
    nothing = (math.nan,) * len(found.layer_map)
    rows, columns = found.matrix.shape
    return Alignment(
        estimator=aligned.ESTIMATORS[found.pooled],
        student_layers=_names(rows),
        teacher_layers=_names(columns),
        layer_map=list(found.layer_map),
        positions=found.tokens,
        sequences=found.texts,
        groups=found.sums.products().groups,
        dropped_outliers=found.dropped_outliers,
        positions_sha256=found.positions_sha256,
        before=AlignmentState(
            matrix=[[_finite(value) for value in row] for row in found.matrix],
            diagonal=[_estimate(interval) for interval in found.diagonal],
            with_outliers=[_finite(value) for value in found.with_outliers],
            distances=[_distance(geometry) for geometry in found.geometry],
        ),
        after=None,
        ceiling=[_finite(value) for value in found.ceiling or nothing],
        floor=[_finite(value) for value in found.floor or nothing],
        headroom_recovered_last=None,
        headroom_recovered_mean=None,
    )


@dataclass(frozen=True)
class _Headroom:
    before: hsic.Products
    after: hsic.Products
    ceiling: hsic.Products

    def recovered(self, layer_map: Sequence[tuple[int, int]]) -> Estimate:
        """Share of the headroom won, mean CKA over `layer_map`, with its jackknife interval."""
        left_out = [self._without(group).share(layer_map) for group in range(self.before.groups)]
        return _estimate(hsic.jackknife(self.share(layer_map), left_out, hsic.t_975(self.before.groups - 1)))

    def share(self, layer_map: Sequence[tuple[int, int]]) -> float:
        """(after - before) / (ceiling - before)."""
        own_layers = [(column, column) for _, column in layer_map]
        before = diagonal(self.before, layer_map).mean()
        after = diagonal(self.after, layer_map).mean()
        ceiling = diagonal(self.ceiling, own_layers).mean()
        return float((after - before) / (ceiling - before)) if ceiling != before else math.nan

    def _without(self, group: int) -> "_Headroom":
        return _Headroom(self.before.without(group), self.after.without(group), self.ceiling.without(group))


def _rows(layers: Sequence[Tensor], rows_N: Tensor) -> list[Tensor]:
    return [layer[rows_N] for layer in layers]


def _names(count: int) -> list[str]:
    return ["embeddings", *(f"block {index}" for index in range(count - 1))]


@dataclass(frozen=True)
class _Beside:
    """What is told beside CKA: distances, and CKA over all positions."""

    teacher: list[Tensor]
    stay_N: Tensor
    groups_N: Tensor
    """Of all positions."""
    layer_map: Sequence[tuple[int, int]]

    def with_outliers(self, student: list[Tensor], without: list[float | None]) -> list[float | None]:
        """`without`, unless a position was dropped."""
        if self.stay_N.all():
            return without
        sides = (
            [student[mine] for mine, _ in self.layer_map],
            [self.teacher[row] for _, row in self.layer_map],
        )
        return [_finite(value) for value in np.diag(hsic.matrix(hsic.products(*sides, self.groups_N)))]

    def distances(self, student: list[Tensor]) -> list[LayerDistance]:
        found = []
        for mine, theirs in self.layer_map:
            sums = GeometrySums()
            sums.add(student[mine][self.stay_N], self.teacher[theirs][self.stay_N])
            found.append(_distance(sums.geometry()))
        return found


def _distance(geometry: Geometry) -> LayerDistance:
    return LayerDistance(**{name: _finite(value) for name, value in vars(geometry).items()})


def _state(
    sums: hsic.Products, layer_map: Sequence[tuple[int, int]], beside: _Beside, student: list[Tensor]
) -> AlignmentState:
    left_out = np.array([diagonal(sums.without(group), layer_map) for group in range(sums.groups)])
    intervals = [
        hsic.jackknife(float(value), left_out[:, index].tolist(), hsic.t_975(sums.groups - 1))
        for index, value in enumerate(diagonal(sums, layer_map))
    ]
    matrix = [[_finite(value) for value in row] for row in hsic.matrix(sums)]
    return AlignmentState(
        matrix=matrix,
        diagonal=[_estimate(interval) for interval in intervals],
        with_outliers=beside.with_outliers(student, [_finite(interval.value) for interval in intervals]),
        distances=beside.distances(student),
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _estimate(interval: hsic.Interval) -> Estimate | None:
    if not np.isfinite(interval.value):
        return None
    return Estimate(value=interval.value, low=_finite(interval.low), high=_finite(interval.high))
