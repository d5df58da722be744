"""From measurements to a verdict: pure arithmetic, no model in sight.

The primary measure is the mean token KL(teacher‖student) on test; its floor is the teacher's
KL to itself after a round trip through bfloat16. With r = (before - after) / (before - floor)
and its 95 % bootstrap interval over sequences:

    not_needed  before ≤ max(2 x floor, 0.01 nats), and no task has a deficit; nothing is trained
    regressed   the upper bound of r is below 0, or a guarded measure got worse than the gate allows
    no_gain     the interval of r contains 0
    recovered   the lower bound of r is at least `min_recovered`; `partial` above 0, below that
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recoup.schemas import Estimate, Gate, Measure, Outcome

RESAMPLES = 2000
NEGLIGIBLE_NATS = 0.01
TAIL = 2.5
"""Percent of resamples beyond either end of an interval."""

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]


@dataclass(frozen=True)
class Paired:
    """One measure of three models over the same units (sequences, windows, prompts).

    `statistic` turns the values of any set of units, an array with a row a unit, into the measure.
    """

    name: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    statistic: Statistic
    teacher: Array
    before: Array
    after: Array | None
    guarded: bool = False
    retained: bool = False
    """What counts is after / before, not the way to the teacher."""


def ratio_of_sums(link: Callable[[float], float] = float) -> Statistic:
    """link(Σ sum / Σ weight) over units of values (sum, weight): a mean over all tokens of all units."""

    def statistic(values: Array) -> float:
        total, weight = values.sum(0)
        with np.errstate(over="ignore"):
            return float(link(total / weight))

    return statistic


def percentile(q: float) -> Statistic:
    """The q-th percentile of all tokens of all units; a row is a unit, padded with NaN."""
    return lambda values: float(np.percentile(values[~np.isnan(values)], q))


def not_needed(before_kl: float, floor_kl: float, deficits: Sequence[str] = ()) -> bool:
    """Whether the student is as good as its teacher after rounding (nats a token), and in every task."""
    return before_kl <= max(2 * floor_kl, NEGLIGIBLE_NATS) and not deficits


def deficits(measures: Sequence[Paired], seed: int) -> list[str]:
    """The names of those in which a paired test finds the student before to be worse than the teacher.

    The test is that of the recovered fraction: the lower bound of teacher - before, bootstrapped over
    units, is above zero. Its level is divided by the number of measures (Bonferroni), so that more
    tasks do not find more by chance.
    """
    level = TAIL / max(1, len(measures))
    return [item.name for item in measures if _has_deficit(item, _bootstrap(item, seed), level)]


def measure(paired: Paired, gate: Gate, seed: int) -> Measure:
    """The measure with its recovered fraction and whether it got worse than the gate allows."""
    recovered, retained, worse = None, None, False
    if paired.after is not None:
        draws = _bootstrap(paired, seed)
        recovered = None if paired.retained else _recovered(paired, draws)
        retained = _retained(paired, draws) if paired.retained else None
        worse = paired.guarded and _worse(paired, draws, gate.max_regression)
    return Measure(
        name=paired.name,
        label=paired.label,
        unit=paired.unit,
        better=paired.better,
        n=len(paired.before),
        teacher=paired.statistic(paired.teacher),
        before=paired.statistic(paired.before),
        after=None if paired.after is None else paired.statistic(paired.after),
        recovered=recovered,
        retained=retained,
        guarded=paired.guarded,
        worse=worse,
    )


def lead(floor: Array, before: Array, ours: Array, theirs: Array, *, seed: int) -> Estimate | None:
    """How much more of the gap one student recovered than another, over the same units of (sum, weight).

    (theirs - ours) / (before - floor), bootstrapped over units; None where there is no gap.
    """
    mean = ratio_of_sums()
    resamples = np.random.default_rng(seed).integers(0, len(before), (RESAMPLES, len(before)))

    def share(rows: NDArray[np.int64] | slice) -> float:
        gap = mean(before[rows]) - mean(floor[rows])
        return (mean(theirs[rows]) - mean(ours[rows])) / gap if gap > 0 else float("nan")

    value, draws = share(slice(None)), np.array([share(rows) for rows in resamples])
    return _estimate(value, draws) if np.isfinite(draws).all() else None


def outcome(primary: Measure, measures: Sequence[Measure], gate: Gate) -> tuple[Outcome, str]:
    """The verdict on a trained student, and why, in one sentence."""
    r = primary.recovered
    if primary.after is None:
        return "regressed", "No trained checkpoint gave finite numbers: training diverged."
    if r is None or r.low is None or r.high is None:
        return "no_gain", "A paired test finds no distance to the teacher that could be won back."
    found = f"{r.value:.0%} of the KL gap was recovered, 95 % interval {r.low:.0%} to {r.high:.0%}"
    worse = [item for item in measures if item.worse]
    if r.high < 0:
        return "regressed", f"The best trained checkpoint is further from the teacher than before: {found}."
    if worse:
        names = ", ".join(f"{item.label} ({item.before:.3g} → {item.after:.3g})" for item in worse)
        return "regressed", f"{found}, but a guarded measure got worse: {names}."
    return _gain(r.low, gate, found)


def _gain(low: float, gate: Gate, found: str) -> tuple[Outcome, str]:
    if low <= 0:
        return "no_gain", f"{found}; it contains zero."
    if low < gate.min_recovered:
        return "partial", f"{found}; the lower bound is below the gate of {gate.min_recovered:.0%}."
    return "recovered", f"{found}; the lower bound reaches the gate of {gate.min_recovered:.0%}."


def _bootstrap(paired: Paired, seed: int) -> dict[str, Array]:
    """The measure of each model in every resample of units, the same units for all."""
    units = len(paired.before)
    resamples = np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))
    models = {"teacher": paired.teacher, "before": paired.before, "after": paired.after}
    return {
        name: np.array([paired.statistic(values[rows]) for rows in resamples])
        for name, values in models.items()
        if values is not None
    }


def _has_deficit(paired: Paired, draws: dict[str, Array], level: float = TAIL) -> bool:
    sign = 1.0 if paired.better == "higher" else -1.0
    return bool(np.percentile(sign * (draws["teacher"] - draws["before"]), level) > 0)


def _recovered(paired: Paired, draws: dict[str, Array]) -> Estimate | None:
    """(after - before) / (teacher - before); nothing where a paired test finds no deficit before."""
    gap, won = draws["teacher"] - draws["before"], draws["after"] - draws["before"]
    if not _has_deficit(paired, draws) or not np.isfinite(won).all():
        return None
    models = (paired.teacher, paired.before, paired.after)
    teacher, before, after = (paired.statistic(values) for values in models if values is not None)
    there = gap != 0
    return _estimate((after - before) / (teacher - before), won[there] / gap[there])


def _retained(paired: Paired, draws: dict[str, Array]) -> Estimate | None:
    if paired.after is None or (draws["before"] <= 0).any():
        return None
    return _estimate(
        paired.statistic(paired.after) / paired.statistic(paired.before), draws["after"] / draws["before"]
    )


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = np.percentile(draws, [TAIL, 100 - TAIL])
    return Estimate(value=value, low=float(low), high=float(high))


def _worse(paired: Paired, draws: dict[str, Array], allowed: float) -> bool:
    assert paired.after is not None
    sign = 1.0 if paired.better == "lower" else -1.0
    before, after = paired.statistic(paired.before), paired.statistic(paired.after)
    if not np.isfinite(after):
        return True
    lost = sign * (after - before) > allowed * abs(before)
    return bool(lost and np.percentile(sign * (draws["after"] - draws["before"]), TAIL) > 0)
