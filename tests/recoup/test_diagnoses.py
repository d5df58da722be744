"""`client.diagnoses` and what the command line prints of one, against a server that answers in turn."""

import json
from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from recoup import JobFailedError, WaitTimeoutError
from recoup._commands import app
from recoup._render import print_diagnosis
from recoup.schemas import DiagnosisReport, Report

MODELS = {"student": {"source": "s"}, "teacher": {"source": "t"}}
PROGRESS = {"stage": "diagnose", "done": 3, "total": 9, "unit": "sequences", "eta_seconds": None}
ERROR = {"code": "empty_dataset", "message": "No prompt is left."}


def row(version, state, **more):
    job = {"id": "dia_1", "object": "diagnosis", "state": state, "version": version, "request": MODELS}
    empty = ("stage", "error", "progress", "report", "retry_of", "started_at", "finished_at")
    counts = {"epoch": 1, "failures": 0, "losses": 0, "pausing": False, "created_at": 0.0}
    return json.dumps(job | dict.fromkeys(empty) | counts | more).encode()


@pytest.fixture
def report():
    whole = Report.model_validate_json((Path(__file__).parent / "report.json").read_text())
    fields = {name: getattr(whole, name) for name in DiagnosisReport.model_fields if hasattr(whole, name)}
    return DiagnosisReport.model_validate(fields | {"object": "diagnosis.report", "needed": True})


@pytest.fixture
def answer(service):
    """Sets what the server answers, one after another."""

    def answer(*bodies):
        service.diagnoses.extend((200 if body else 304, body) for body in bodies)

    return answer


def test_a_bare_name_is_a_model_and_only_what_was_given_is_sent(client, service, answer):
    answer(row(1, "queued"))
    assert client.diagnoses.create(student="s", teacher="t", seed=3).state == "queued"
    (sent,) = service.sent("POST", "/v1/diagnoses")
    assert json.loads(sent.body) == MODELS | {"seed": 3}


def test_a_field_of_training_is_refused_before_anything_is_sent(client, service):
    with pytest.raises(ValidationError):
        client.diagnoses.create(student="s", teacher="t", training={"steps": 3})
    assert service.seen == []


def test_waiting_polls_with_what_was_seen_and_tells_the_progress(client, service, answer, report):
    told = []
    answer(
        row(1, "queued"),
        b"",
        row(2, "running", progress=PROGRESS),
        row(3, "succeeded", report=report.model_dump(mode="json")),
    )
    found = client.diagnoses.wait("dia_1", on_progress=told.append)
    assert found.report == report and [point.done for point in told] == [3]
    conditions = [request.headers.get("If-None-Match") for request in service.seen]
    assert conditions == [None, '"1"', '"1"', '"2"']


def test_a_diagnosis_that_failed_raises_its_reason(client, answer):
    answer(row(1, "failed", stage="diagnose", error=ERROR))
    with pytest.raises(JobFailedError, match="Diagnosis dia_1 failed in stage diagnose: No prompt is left"):
        client.diagnoses.wait("dia_1")


def test_patience_has_an_end(client, answer):
    answer(row(1, "running"))
    with pytest.raises(WaitTimeoutError, match="Diagnosis dia_1 is still running"):
        client.diagnoses.wait("dia_1", timeout=0)


def test_history_and_alignment_are_its_own(client, service, answer, report):
    event = {"object": "recovery.event", "seq": 1, "epoch": 1, "type": "log", "data": {}, "at": 1.0}
    page = {"object": "list", "data": [event], "has_more": False, "next_cursor": None}
    answer(json.dumps(page).encode(), report.alignment.model_dump_json().encode())
    assert [event.seq for event in client.diagnoses.history("dia_1")] == [1]
    assert client.diagnoses.alignment("dia_1") == report.alignment
    paths = [request.path for request in service.seen]
    assert paths == ["/v1/diagnoses/dia_1/events", "/v1/diagnoses/dia_1/alignment"]


@pytest.fixture
def diagnose(service, monkeypatch):
    monkeypatch.setenv("RECOUP_BASE_URL", service.url)
    command = ["diagnose", "--student", "s", "--teacher", "t"]
    return lambda *options: CliRunner().invoke(app, [*command, *map(str, options)])


def test_the_command_sends_its_files_and_prints_what_was_found(diagnose, service, answer, report, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n')
    ended = row(2, "succeeded", report=report.model_dump(mode="json"))
    answer(row(1, "running"), row(1, "running", progress=PROGRESS), ended)
    files = ["--prompts", tmp_path / "general.jsonl", "--task", f"sums={tmp_path / 'sums.jsonl'}:number"]
    result = diagnose(*files, "--harness", "arc", "--seed", 3)
    assert (result.exit_code, result.stderr) == (0, "diagnose: 3/9 sequences\n")
    assert result.stdout.startswith(f"damage: {report.damage.kind}")
    (sent,) = service.sent("POST", "/v1/diagnoses")
    ids = {file["filename"]: id for id, file in service.files.items()}
    task = {"name": "sums", "file": ids["sums.jsonl"], "match": "number"}
    evaluation = {"tasks": [task], "harness": [{"name": "arc"}]}
    more = {"prompts": {"file": ids["general.jsonl"]}, "evaluation": evaluation, "seed": 3}
    assert json.loads(sent.body) == MODELS | more


def test_the_command_says_why_there_is_no_report(diagnose, answer):
    answer(row(1, "queued"), row(2, "cancelled"))
    result = diagnose()
    assert (result.exit_code, result.stderr) == (1, "dia_1 was cancelled.\n")
    answer(row(1, "queued"), row(2, "failed", stage="diagnose", error=ERROR))
    result = diagnose("--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert json.loads(result.stderr)["error"]["type"] == "JobFailedError"


def test_it_is_printed_with_measures_and_layers(report):
    console = Console(width=140, record=True, file=StringIO())
    print_diagnosis(report, console)
    text = console.export_text()
    assert f"damage: {report.damage.kind}; there is something to recover" in text
    assert report.measures[0].label in text and report.alignment.student_layers[-1] in text
