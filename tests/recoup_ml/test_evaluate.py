"""What the evaluation says in words."""

import json
from pathlib import Path

import pytest

from recoup.schemas import Alignment, Estimate, Measure, Report
from recoup_ml.evaluate import disagreements, out_of_reach


@pytest.fixture
def alignment() -> Alignment:
    reports = json.loads(Path(__file__).with_name("sample_report.json").read_text())
    return Report.model_validate(reports["recovered"]).alignment


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


def test_alignment_that_fell_while_the_divergence_shrank_is_named(alignment: Alignment) -> None:
    fell = alignment.model_copy(update={"headroom_recovered_mean": estimate(-0.4)})
    (sentence,) = disagreements(estimate(0.7), fell)
    assert "mean alignment fell" in sentence and "shrank" in sentence


def test_alignment_that_rose_while_the_divergence_grew_is_named(
    alignment: Alignment,
) -> None:
    sentences = disagreements(estimate(-0.5), alignment)
    assert len(sentences) == 2 and all("rose" in text and "grew" in text for text in sentences)


def test_measures_that_agree_or_cannot_tell_are_left_in_peace(alignment: Alignment) -> None:
    unsure = alignment.model_copy(update={"headroom_recovered_last": estimate(-0.05)})
    assert disagreements(estimate(0.7), alignment) == []
    assert disagreements(estimate(0.7), unsure) == []
    assert disagreements(None, alignment) == []


def measured(name: str, recovered: float | None = None) -> Measure:
    return Measure(
        name=name,
        label=name.removeprefix("task:"),
        unit="share",
        better="higher",
        n=64,
        teacher=0.8,
        before=0.2,
        after=0.4,
        recovered=None if recovered is None else estimate(recovered),
        retained=None,
        guarded=True,
        worse=False,
    )


def test_a_task_that_stays_short_of_the_teacher_though_the_gap_is_closed_is_named() -> None:
    found = [measured("kl", 0.93), measured("task:sums"), measured("task:capitals")]
    (sentence,) = out_of_reach(found, ["task:sums"])
    for part in ("Not recoverable at this size", "sums, stays at 0.4", "teacher's 0.8", "93%"):
        assert part in sentence


@pytest.mark.parametrize("recovered", [0.89, None])
def test_a_task_that_more_training_may_bring_back_is_left_in_peace(recovered: float | None) -> None:
    assert out_of_reach([measured("kl", recovered), measured("task:sums")], ["task:sums"]) == []
