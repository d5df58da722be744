"""From numbers to a verdict, on arrays whose verdict is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from recoup.schemas import Gate, Measure
from recoup_ml.verdict import Paired, deficits, measure, not_needed, outcome, percentile, ratio_of_sums

GATE = Gate(min_recovered=0.5, max_regression=0.01)
SEQUENCES = 64


def units(mean: float, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    """(sum, weight) of sequences of 10 tokens around a mean; equal seeds are paired."""
    values = mean * (1 + spread * np.random.default_rng(seed).standard_normal(SEQUENCES))
    return np.array([10 * values, np.full(SEQUENCES, 10.0)]).T


def paired(after: np.ndarray | None, **changes: object) -> Paired:
    kl = Paired("kl", "token KL", "nats", "lower", ratio_of_sums(), units(0.001), units(1.0), after)
    return replace(kl, **changes)


def guarded(before: float, after: float, **changes: object) -> Measure:
    """A guarded measure whose every unit got better or worse alike."""
    bits = paired(units(after), label="natural text", teacher=units(0.9), before=units(before), guarded=True)
    return measure(replace(bits, **changes), GATE, seed=0)


def verdict_of(after: np.ndarray | None, *others: Measure) -> tuple[str, str]:
    primary = measure(paired(after), GATE, seed=0)
    return outcome(primary, [primary, *others], GATE)


@pytest.mark.parametrize(
    ("before", "floor", "spared"),
    [
        (0.0, 0.0, True),
        (0.01, 0.0001, True),
        (0.0101, 0.0001, False),
        (0.06, 0.03, True),
        (0.0601, 0.03, False),
        (math.inf, 0.0, False),
        (math.nan, 0.0, False),
    ],
)
def test_nothing_is_needed_below_twice_the_floor_or_a_hundredth_of_a_nat(
    before: float, floor: float, spared: bool
) -> None:
    assert not_needed(before, floor) is spared


def test_a_task_with_a_deficit_needs_a_recovery_however_small_the_divergence() -> None:
    assert not_needed(0.0, 0.0, [])
    assert not not_needed(0.0, 0.0, ["task:sums"])


def task(teacher: int, before: int, rows: int = SEQUENCES, name: str = "task:sums") -> Paired:
    """So many rows answered rightly; what the student knows, its teacher knows, or the other way round."""

    def right(count: int) -> np.ndarray:
        return np.array([np.arange(rows) < count, np.ones(rows)], dtype=float).T

    marks = right(teacher), right(before), None
    return Paired(name, name, "share", "higher", ratio_of_sums(), *marks, guarded=True)


@pytest.mark.parametrize(
    ("teacher", "before", "found"), [(60, 20, True), (60, 60, False), (60, 59, False), (20, 60, False)]
)
def test_a_deficit_is_what_a_paired_test_finds(teacher: int, before: int, found: bool) -> None:
    assert deficits([task(teacher, before)], seed=0) == (["task:sums"] if found else [])


def test_only_the_tasks_that_fell_are_named() -> None:
    assert deficits([task(60, 60, name="task:a"), task(60, 9, name="task:b")], seed=0) == ["task:b"]


def test_without_tasks_there_is_no_deficit() -> None:
    assert deficits([], seed=0) == []


def test_a_deficit_that_one_task_shows_by_a_hair_is_chance_among_eight() -> None:
    narrow, healthy = task(60, 55), [task(60, 60, name=f"task:{n}") for n in range(7)]
    assert deficits([narrow], seed=0) == ["task:sums"]
    assert deficits([narrow, *healthy], seed=0) == []


def test_a_task_has_a_recovered_fraction_where_it_has_a_deficit() -> None:
    after = task(60, 50).before
    for before, fraction in ((20, 0.75), (60, None)):
        found = measure(replace(task(60, before), after=after), GATE, seed=0)
        assert (found.recovered and found.recovered.value) == fraction
        assert found.worse == (before == 60)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (units(0.1, seed=1), "recovered"),
        (units(0.7, seed=1), "partial"),
        (units(1.0, spread=0.5, seed=1), "no_gain"),
        (units(1.5, seed=1), "regressed"),
    ],
)
def test_the_interval_of_the_recovered_fraction_decides(after: np.ndarray, expected: str) -> None:
    assert verdict_of(after)[0] == expected


def test_the_gate_divides_recovered_from_partial() -> None:
    primary = measure(paired(units(0.3, seed=1)), GATE, seed=0)
    gates = [Gate(min_recovered=bound) for bound in (primary.recovered.low, primary.recovered.value)]
    assert [outcome(primary, [primary], gate)[0] for gate in gates] == ["recovered", "partial"]


def test_a_guarded_measure_that_got_worse_undoes_a_gain() -> None:
    found, why = verdict_of(units(0.1, seed=1), guarded(before=1.0, after=1.05))
    assert found == "regressed"
    assert "natural text (1" in why


def test_a_loss_within_the_gate_is_no_regression() -> None:
    assert verdict_of(units(0.1, seed=1), guarded(before=1.0, after=1.009))[0] == "recovered"


def test_a_loss_that_may_be_chance_is_no_regression() -> None:
    worse_by_chance = measure(
        paired(units(1.03, spread=0.5, seed=2), before=units(1.0, spread=0.5), guarded=True), GATE, seed=0
    )
    assert worse_by_chance.after > worse_by_chance.before * 1.01
    assert not worse_by_chance.worse


def test_a_measure_that_is_not_guarded_never_counts_as_worse() -> None:
    assert not measure(paired(units(5.0)), GATE, seed=0).worse


def test_where_higher_is_better_a_fall_is_worse() -> None:
    fell = guarded(before=0.9, after=0.8, better="higher")
    rose = guarded(before=0.8, after=0.9, better="higher")
    assert (fell.worse, rose.worse) == (True, False)


def test_a_guarded_measure_that_is_not_finite_is_worse() -> None:
    assert guarded(before=1.0, after=math.inf).worse


def test_training_without_finite_numbers_is_regressed() -> None:
    found, why = verdict_of(None)
    assert found == "regressed"
    assert "diverged" in why


def test_damage_that_chance_may_explain_is_not_called_diverged_training() -> None:
    """One sequence holds all the damage: a paired test finds no deficit, and nothing got worse."""
    before = units(0.0005, seed=1)
    before[0] = 50.0, 10.0
    primary = measure(paired(units(0.0005, seed=2), before=before), GATE, seed=0)
    assert not not_needed(primary.before, primary.teacher)
    found, why = outcome(primary, [primary], GATE)
    assert found != "regressed"
    assert "diverged" not in why


def test_the_recovered_fraction_is_its_formula() -> None:
    found = measure(paired(units(0.4)), GATE, seed=0)
    expected = (found.after - found.before) / (found.teacher - found.before)
    assert found.recovered.value == pytest.approx(expected)
    assert expected == pytest.approx(0.6, abs=0.001)


def test_paired_units_make_the_interval_narrow() -> None:
    """Every sequence recovers the same share: whichever are drawn, the fraction is the same."""
    alike = measure(paired(units(0.4), teacher=units(0.0)), GATE, seed=0).recovered
    apart = measure(paired(units(0.4, seed=1), teacher=units(0.0)), GATE, seed=0).recovered
    assert alike.high - alike.low < 1e-9
    assert apart.high - apart.low > 0.01


def test_a_longer_sequence_weighs_more() -> None:
    values = np.array([[10.0, 10.0], [0.0, 30.0]])
    assert ratio_of_sums()(values) == 0.25
    assert ratio_of_sums(math.exp)(values) == pytest.approx(math.exp(0.25))


def test_padding_is_no_token_of_a_percentile() -> None:
    values = np.array([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan]])
    assert percentile(50)(values) == 2.0


def test_equal_seeds_give_equal_intervals() -> None:
    first, again, other = (measure(paired(units(0.4, seed=1)), GATE, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.recovered != other.recovered
    assert first.recovered.value == other.recovered.value


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_without_a_deficit_there_is_nothing_to_recover(better: str) -> None:
    unharmed = paired(units(0.9), teacher=units(1.0, 0.3, seed=1), before=units(1.0, 0.3), better=better)
    assert measure(unharmed, GATE, seed=0).recovered is None


def test_a_student_better_than_its_teacher_has_no_deficit() -> None:
    ahead = paired(units(0.8), teacher=units(1.0), before=units(0.7))
    assert measure(ahead, GATE, seed=0).recovered is None


def test_a_kept_skill_is_retained_and_not_recovered() -> None:
    skill = paired(
        units(0.72), teacher=units(0.1), before=units(0.9), better="higher", guarded=True, retained=True
    )
    found = measure(skill, GATE, seed=0)
    assert found.recovered is None
    assert found.retained.value == pytest.approx(0.8)
    assert found.worse


def test_a_skill_that_was_never_there_has_no_share_retained() -> None:
    nothing = np.array([np.zeros(SEQUENCES), np.ones(SEQUENCES)]).T
    found = measure(paired(nothing, before=nothing, better="higher", retained=True), GATE, seed=0)
    assert found.retained is None


def test_before_training_a_measure_has_only_teacher_and_before() -> None:
    found = measure(paired(None, guarded=True), GATE, seed=0)
    assert (found.after, found.recovered, found.retained, found.worse) == (None, None, None, False)
    assert found.n == SEQUENCES
