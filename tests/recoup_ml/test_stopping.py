"""When training ends before its last step, and when it goes on."""

import pytest

from recoup_ml.stopping import reason_to_stop

BEFORE, FLOOR = 1.0, 0.01


@pytest.mark.parametrize(
    ("validations", "reason"),
    [
        ([], None),
        ([0.5], None),
        ([0.5, 0.3, 0.2, 0.15], None),
        ([0.5, 0.019], "gap_closed"),
        ([1.2, 1.1], None),
        ([1.2, 1.1, 0.9], None),
        ([1.2, 1.3, 1.1], "regression"),
        ([0.5, 1.1, 1.2, 1.1], "regression"),
        ([0.5, 0.5, 0.5], None),
        ([0.5, 0.5, 0.5, 0.4995], "plateau"),
        ([0.5, 0.51, 0.52, 0.48], None),
        ([0.99, 0.5, 0.52, 0.53], None),
        ([0.5, 0.52, 0.53, 0.51], "plateau"),
    ],
)
def test_training_ends_for_a_reason(validations: list[float], reason: str | None) -> None:
    assert reason_to_stop(BEFORE, FLOOR, validations) == reason


def test_a_phase_on_probation_ends_with_the_first_validation_without_a_gain() -> None:
    assert reason_to_stop(BEFORE, FLOOR, [0.5, 0.51], patience=1) == "plateau"
    assert reason_to_stop(BEFORE, FLOOR, [0.5, 0.45], patience=1) is None


def test_a_validation_that_is_not_finite_is_no_gain() -> None:
    assert reason_to_stop(BEFORE, FLOOR, [0.5, float("inf"), float("inf"), float("inf")]) == "regression"
