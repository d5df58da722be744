"""What the estimate of a recovery counts with is what the recovery does."""

import pytest

from recoup_jobs import estimate
from recoup_ml import answers, probe, repair, room, splits, stream, training


@pytest.mark.parametrize(
    "counted, done",
    [
        ((estimate.SAMPLES, estimate.KEPT), (probe.SAMPLES, probe.KEPT)),
        ((estimate.WINDOWS, estimate.WINDOW_TOKENS), (probe.WINDOWS, probe.WINDOW_TOKENS)),
        (estimate.DEFAULT_KEEP_TOKENS, probe.DEFAULT_KEEP_TOKENS),
        (estimate.CALIBRATION, answers.CALIBRATION),
        (estimate.FIT_TOKENS, stream.CALIBRATION_TOKENS),
        (estimate.FREE_TOKENS, repair.FREE_TEXTS * (1 + repair.FREE_TOKENS)),
        (estimate.VALIDATIONS, training.VALIDATIONS),
        ((estimate.TEST_SHARE, estimate.VALIDATION_SHARE), (splits.TEST_SHARE, splits.VALIDATION_SHARE)),
        (
            (estimate.LEAST_TESTED, estimate.MOST_TESTED_SHARE),
            (splits.LEAST_TESTED, splits.MOST_TESTED_SHARE),
        ),
        (
            (estimate.CPU_TOKENS, estimate.FEWEST_TOKENS, estimate.MOST_TOKENS, estimate.SHARE),
            (room.CPU_TOKENS, room.FEWEST_TOKENS, room.MOST_TOKENS, room.SHARE),
        ),
        (
            (estimate.RECOMPUTED, estimate.WORKING, estimate.RECOMPUTE_BELOW),
            (room.RECOMPUTED, room.WORKING, room.RECOMPUTE_BELOW),
        ),
        (
            (estimate.ACTIVATIONS, estimate.FORMS_OF_LOSS, estimate.OPTIMIZER_BYTES),
            (room.ACTIVATIONS, room.HEAD_COPIES, room.OPTIMIZER_BYTES),
        ),
    ],
)
def test_the_estimate_counts_with_what_the_recovery_does(counted, done):
    assert counted == done
