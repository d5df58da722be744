"""Times come from the finished jobs that are most like the one that is asked about."""

import pytest

from recoup_jobs import calibration
from recoup_jobs.calibration import Measured, seconds_for

both = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


def test_what_was_never_measured_has_no_time():
    known = [Measured("diagnose", "lora", 100, 10.0, 1.0)]
    assert seconds_for({"diagnose": 10.0, "distil": 10.0}, "lora", 100, known) is None


def test_the_same_work_takes_as_long_again():
    known = [Measured("diagnose", "lora", 100, 10.0, 3.0), Measured("distil", "lora", 100, 20.0, 4.0)]
    assert seconds_for({"diagnose": 10.0, "distil": 20.0}, "lora", 100, known) == pytest.approx(7.0)


def test_of_one_row_half_is_taken_for_the_start():
    assert seconds_for(
        {"distil": 40.0}, "lora", 100, [Measured("distil", "lora", 100, 20.0, 4.0)]
    ) == pytest.approx(6.0)


@pytest.mark.parametrize(("start", "rate"), [(2.0, 0.1), (30.0, 0.001), (0.0, 0.5)])
def test_start_and_rate_are_told_apart_by_jobs_of_different_size(start, rate):
    known = [Measured("distil", "lora", 100, work, start + rate * work) for work in (10.0, 20.0, 80.0, 300.0)]
    found = seconds_for({"distil": 1000.0}, "lora", 100, known)
    assert found == pytest.approx(start + rate * 1000, rel=0.1)


def test_neither_start_nor_rate_is_below_nothing():
    falling = [Measured("distil", "lora", 100, work, 100 / work) for work in (10.0, 20.0, 40.0)]
    rising = [Measured("distil", "lora", 100, work, work**2) for work in (10.0, 20.0, 40.0)]
    assert seconds_for({"distil": 1e9}, "lora", 100, falling) > 0
    assert seconds_for({"distil": 1e-9}, "lora", 100, rising) >= 0


def test_the_mode_of_training_counts():
    known = [Measured("distil", "full", 100, 10.0, 50.0)] * 5 + [
        Measured("distil", "lora", 100, 10.0, 1.0)
    ] * 5
    assert seconds_for({"distil": 10.0}, "lora", 100, known) == pytest.approx(1.0, rel=0.2)
    assert seconds_for({"distil": 10.0}, "full", 100, known) == pytest.approx(50.0, rel=0.2)


def test_a_model_of_the_same_size_counts_before_another():
    known = [Measured("distil", "lora", 10**9, 10.0, 90.0)] * 5 + [
        Measured("distil", "lora", 100, 10.0, 1.0)
    ] * 5
    assert seconds_for({"distil": 10.0}, "lora", 120, known) == pytest.approx(1.0, rel=0.2)


def test_one_slow_job_among_five_changes_nothing():
    known = [Measured("distil", "lora", 100, 10.0, seconds) for seconds in (1.0, 1.0, 1.0, 1.0, 900.0)]
    assert seconds_for({"distil": 10.0}, "lora", 100, known) == pytest.approx(1.0, rel=0.2)


@both
def test_a_class_of_machine_knows_its_own_jobs(ledger):
    mine, other = (Measured("distil", "lora", 5, 10.0, seconds) for seconds in (1.0, 2.0))
    calibration.record(ledger, "gpu.cpu", "rec_1", [mine, mine])
    calibration.record(ledger, "gpu.h100", "rec_2", [other])
    assert calibration.read(ledger, "gpu.cpu") == [mine, mine]
    assert calibration.jobs_measured(ledger, "gpu.cpu") == 1


@both
def test_what_is_too_old_to_count_is_dropped(ledger, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_ROWS", 3)
    for seconds in range(1, 6):
        calibration.record(ledger, "gpu.cpu", f"rec_{seconds}", [Measured("distil", "lora", 5, 1.0, seconds)])
    assert [one.seconds for one in calibration.read(ledger, "gpu.cpu")] == [5.0, 4.0, 3.0]
