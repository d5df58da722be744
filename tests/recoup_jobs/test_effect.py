"""What the effect probe makes of a server's log-probabilities."""

import pytest

from recoup.schemas import EffectProbe, ProbeRow
from recoup_jobs.effect import TOLERANCE_NATS, verdict

COUNT = 3


def probe(effect):
    rows = [ProbeRow(ids=[1], token=7, base=-2.0, recovered=effect - 2.0)] * COUNT
    return EffectProbe(object="recovery.probe", base_sha256="0" * 64, rows=rows)


def each(log_p):
    return [log_p] * COUNT


def code(*asked):
    found = verdict(*asked)
    return found and found.code


def test_a_server_that_does_what_the_trainer_saw_may_serve():
    assert code(probe(1.0), each(-1.0), each(-2.0)) is None


@pytest.mark.parametrize("noise", [0.5 * TOLERANCE_NATS, -0.5 * TOLERANCE_NATS])
def test_rounding_is_tolerated(noise):
    assert code(probe(0.1), each(-1.9 + noise), each(-2.0 + noise)) is None


@pytest.mark.parametrize(
    ("served", "base", "expected"),
    [
        (-2.0, -2.0, "no_effect"),
        (-1.9, -2.0, "no_effect"),
        (-1.5, -2.0, "effect_mismatch"),
        (-3.0, -2.0, "effect_mismatch"),
        (-1.0, -2.5, "base_mismatch"),
        (-1.5, -2.5, "base_mismatch"),
        (float("nan"), -2.0, "probe_not_finite"),
        (-1.0, float("-inf"), "probe_not_finite"),
    ],
)
def test_anything_else_may_not(served, base, expected):
    assert code(probe(1.0), each(served), each(base)) == expected


def test_an_adapter_that_makes_answers_less_likely_is_proven_the_same_way():
    assert code(probe(-1.0), each(-3.0), each(-2.0)) is None
    assert code(probe(-1.0), each(-1.0), each(-2.0)) == "effect_mismatch"


def test_changes_that_cancel_out_over_the_rows_are_seen():
    served = [log_p + off for log_p, off in zip(each(-1.0), (0.6, -0.6, 0.0), strict=True)]
    assert code(probe(1.0), served, each(-2.0)) == "effect_mismatch"


def test_what_changed_nothing_in_training_proves_nothing():
    assert code(probe(0.001), each(-1.999), each(-2.0)) == "effect_too_small"


def test_a_whole_model_is_compared_with_the_trainers_student():
    assert code(probe(1.0), each(-1.0)) is None
    assert code(probe(1.0), each(-2.0)) == "no_effect"
    assert code(probe(1.0), each(-1.5)) == "effect_mismatch"
