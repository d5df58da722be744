"""From the SDK through API, broker, worker and runner to the report, nothing replaced."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recoup import Client, JobFailedError, UnprocessableEntityError
from recoup.schemas import Recovery

SMALL = {
    "generation": {"max_new_tokens": 12},
    "training": {"steps": 12, "batch_size": 8, "learning_rate": 0.01},
    "evaluation": {"test_sequences": 32, "validation_sequences": 16},
    "alignment": {"positions": 256},
}
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def submit(client: Client, models: Path, write_rows: Callable[[int], Path]) -> Submit:
    """`submit("student", training=...)`: uploads 200 prompts and submits a small recovery; its id."""

    def submit(student: str = "student", **changes: object) -> str:
        prompts = client.files.create(write_rows(200))
        fields = SMALL | {"prompts": {"file": prompts.id}} | changes
        return client.recoveries.create(student=student, teacher="teacher", **fields).id

    return submit


@pytest.fixture(scope="module")
def ended(client: Client, submit: Submit) -> Recovery:
    """A recovery that went all the way."""
    return client.recoveries.wait(submit(), timeout=400)


def test_a_recovery_goes_all_the_way_to_its_report(client: Client, ended: Recovery, tmp_path: Path) -> None:
    id = ended.id
    assert ended.state == "succeeded"
    report = client.recoveries.report(id)
    assert report.outcome == ended.outcome
    assert report.measures[0].name == "kl" and report.measures[0].after is not None
    assert report.training is not None and report.training.steps == 12
    assert 24 <= report.splits.test <= 32 and report.splits.test_kinds
    assert report.cost.estimate is not None and report.cost.estimate.memory_bytes > 0
    again = client.recoveries.dry_run(**client.recoveries.get(id).request.model_dump(exclude_unset=True))
    assert again.findings == [] and again.estimate is not None
    assert again.estimate.seconds is not None and again.estimate.calibrated_on >= 1
    files = client.recoveries.download(id, tmp_path / "results")
    names = {path.relative_to(tmp_path / "results").as_posix() for path in files}
    assert {"report.json", "report.html", "alignment.png"} <= names
    assert ("adapter/adapter_model.safetensors" in names) == report.promoted


def test_the_history_of_a_recovery_has_no_gap_and_commits_each_stage_once(
    client: Client, ended: Recovery
) -> None:
    events = list(client.recoveries.history(ended.id))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    committed = [e.data["stage"] for e in events if e.type == "stage" and e.data["status"] == "committed"]
    assert committed == ["preflight", "diagnose", "generate", "distil", "evaluate", "package"]


def test_a_teacher_against_itself_needs_no_recovery(client: Client, submit: Submit) -> None:
    id = submit("teacher")
    assert client.recoveries.wait(id, timeout=400).outcome == "not_needed"
    assert client.recoveries.report(id).training is None
    stages = {event.data.get("stage") for event in client.recoveries.history(id)}
    assert "distil" not in stages


def test_a_killed_runner_is_followed_by_another_that_skips_what_is_committed(
    client: Client, submit: Submit
) -> None:
    id = submit(training=SMALL["training"] | {"steps": 400})
    for event in client.recoveries.events(id):
        if event.type == "metric" and event.data["name"] == "train":
            break
    os.kill(_runner_of(id).pid, signal.SIGKILL)
    assert client.recoveries.wait(id, timeout=400).state == "succeeded"
    events = list(client.recoveries.history(id))
    committed = [e.data["stage"] for e in events if e.type == "stage" and e.data["status"] == "committed"]
    assert committed.count("generate") == 1 and committed.count("distil") == 1
    assert [event.epoch for event in events] == sorted(event.epoch for event in events)
    assert events[-1].epoch == 2
    assert sum(event.data.get("state") == "succeeded" for event in events if event.type == "state") == 1


def test_a_cancelled_recovery_ends_and_leaves_no_runner(client: Client, submit: Submit) -> None:
    id = submit(training=SMALL["training"] | {"steps": 100_000})
    for event in client.recoveries.events(id):
        if event.type == "metric":
            break
    asked = time.monotonic()
    client.recoveries.cancel(id)
    assert client.recoveries.wait(id, timeout=400).state == "cancelled"
    assert time.monotonic() - asked < 15
    assert not _runners_of(id)


def test_a_recovery_past_its_limit_fails_and_says_so(client: Client, submit: Submit) -> None:
    id = submit(training=SMALL["training"] | {"steps": 100_000}, limits={"wall_seconds": 12})
    with pytest.raises(JobFailedError) as failed:
        client.recoveries.wait(id, timeout=400)
    assert failed.value.recovery.error.code == "deadline_exceeded"


def test_a_missing_model_is_refused_before_anything_is_queued(client: Client, models: Path) -> None:
    with pytest.raises(UnprocessableEntityError) as refused:
        client.recoveries.create(student="nobody", teacher="teacher")
    assert refused.value.code == "model_not_found"


def test_a_diagnosis_comes_back_with_its_report_and_trains_nothing(
    client: Client, models: Path, write_rows: Callable[[int], Path]
) -> None:
    prompts = client.files.create(write_rows(200))
    small = {"generation": {"max_new_tokens": 12}, "evaluation": {"test_sequences": 32}}
    job = client.diagnoses.create(
        student="student",
        teacher="teacher",
        prompts={"file": prompts.id},
        alignment={"positions": 256},
        **small,
    )
    found = client.diagnoses.wait(job.id, timeout=400)
    assert found.state == "succeeded" and found.report is not None and found.report.needed
    assert found.report.measures[0].name == "kl" and found.report.alignment.after is None
    assert list(found.report.cost.stage_seconds) == ["preflight", "diagnose"]
    assert job.id not in {recovery.id for recovery in client.recoveries.list()}


def _runner_of(id: str) -> psutil.Process:
    (runner,) = _runners_of(id)
    return runner


def _runners_of(id: str) -> list[psutil.Process]:
    wanted = {id, "recoup_worker.runner"}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if wanted <= {*(process.info["cmdline"] or ())}
    ]
