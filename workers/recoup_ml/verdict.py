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

AT_ONCE = 1 << 20
"""Values of resamples that are in memory together."""

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From the values of a set of units, or of many sets, [..., units, columns], to the measure, [...]."""


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


def ratio_of_sums(link: Callable[[Array], Array] = np.asarray) -> Statistic:
    """link(Σ sum / Σ weight) over units of values (sum, weight): a mean over all tokens of all units."""

    def statistic(values: Array) -> Array:
        sums = values.sum(-2)
        with np.errstate(over="ignore"):
            return link(sums[..., 0] / sums[..., 1])

    return statistic


def percentile(q: float) -> Statistic:
    """The q-th percentile of all tokens of all units; a row is a unit, padded with NaN."""

    def statistic(values: Array) -> Array:
        tokens = np.sort(values.reshape(*values.shape[:-2], -1))  # NaN last
        places = (np.count_nonzero(~np.isnan(tokens), axis=-1, keepdims=True) - 1) * q / 100
        low, high = (
            np.take_along_axis(tokens, np.asarray(to(places), np.int64), -1) for to in (np.floor, np.ceil)
        )
        return np.asarray((low + (high - low) * (places % 1))[..., 0])

    return statistic


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
        teacher=float(paired.statistic(paired.teacher)),
        before=float(paired.statistic(paired.before)),
        after=None if paired.after is None else float(paired.statistic(paired.after)),
        recovered=recovered,
        retained=retained,
        guarded=paired.guarded,
        worse=worse,
    )


def lead(floor: Array, before: Array, ours: Array, theirs: Array, *, seed: int) -> Estimate | None:
    """How much more of the gap one student recovered than another, over the same units of (sum, weight).

    (theirs - ours) / (before - floor), bootstrapped over units; None where there is no gap.
    """
    mean, resamples = ratio_of_sums(), _resamples(len(before), seed)

    def share(of: Callable[[Array], Array]) -> Array:
        gap = of(before) - of(floor)
        return np.where(gap > 0, (of(theirs) - of(ours)) / np.where(gap > 0, gap, 1.0), np.nan)

    value, draws = share(mean), share(lambda values: _over(resamples, values, mean))
    return _estimate(float(value), draws) if np.isfinite(draws).all() else None


def change(before: Array, after: Array, seed: int) -> Estimate | None:
    """after - before, each Σ sum / Σ weight over the same units of (sum, weight), bootstrapped over units.

    None where any is not finite.
    """
    mean, resamples = ratio_of_sums(), _resamples(len(before), seed)
    draws = _over(resamples, after, mean) - _over(resamples, before, mean)
    return _estimate(float(mean(after) - mean(before)), draws) if np.isfinite(draws).all() else None


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
    resamples = _resamples(len(paired.before), seed)
    models = {"teacher": paired.teacher, "before": paired.before, "after": paired.after}
    return {
        name: _over(resamples, values, paired.statistic)
        for name, values in models.items()
        if values is not None
    }


def _resamples(units: int, seed: int) -> NDArray[np.int64]:
    """Units by number, drawn with replacement: [resamples, units]."""
    return np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))


def _over(resamples: NDArray[np.int64], values: Array, statistic: Statistic) -> Array:
    """The measure in each resample."""
    blocks = -(-len(resamples) * values.size // AT_ONCE)
    parts = [statistic(values[rows]) for rows in np.array_split(resamples, min(blocks, len(resamples)))]
    return np.concatenate(parts)


def _has_deficit(paired: Paired, draws: dict[str, Array], level: float = TAIL) -> bool:
    sign = 1.0 if paired.better == "higher" else -1.0
    return bool(np.percentile(sign * (draws["teacher"] - draws["before"]), level) > 0)


def _recovered(paired: Paired, draws: dict[str, Array]) -> Estimate | None:
    """(after - before) / (teacher - before); nothing where a paired test finds no deficit before."""
    gap, won = draws["teacher"] - draws["before"], draws["after"] - draws["before"]
    if not _has_deficit(paired, draws) or not np.isfinite(won).all():
        return None
    models = (paired.teacher, paired.before, paired.after)
    teacher, before, after = (float(paired.statistic(values)) for values in models if values is not None)
    there = gap != 0
    return _estimate((after - before) / (teacher - before), won[there] / gap[there])


def _retained(paired: Paired, draws: dict[str, Array]) -> Estimate | None:
    if paired.after is None or (draws["before"] <= 0).any():
        return None
    before, after = (float(paired.statistic(values)) for values in (paired.before, paired.after))
    return _estimate(after / before, draws["after"] / draws["before"])


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = np.percentile(draws, [TAIL, 100 - TAIL])
    return Estimate(value=value, low=float(low), high=float(high))


def _worse(paired: Paired, draws: dict[str, Array], allowed: float) -> bool:
    assert paired.after is not None
    sign = 1.0 if paired.better == "lower" else -1.0
    before, after = (float(paired.statistic(values)) for values in (paired.before, paired.after))
    if not np.isfinite(after):
        return True
    lost = sign * (after - before) > allowed * abs(before)
    return bool(lost and np.percentile(sign * (draws["after"] - draws["before"]), TAIL) > 0)
