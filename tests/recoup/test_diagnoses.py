"""`client.diagnoses` and what the command line prints of one, against a server that answers in turn."""

import json
from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from recoup import JobFailedError, WaitTimeoutError
from recoup._render import print_diagnosis
from recoup.diagnoses import Diagnoses
from recoup.schemas import DiagnosisReport, Report

MODELS = {"student": {"source": "s"}, "teacher": {"source": "t"}}


def row(version, state, **more):
    job = {"id": "dia_1", "object": "diagnosis", "state": state, "version": version, "request": MODELS}
    nothing = dict.fromkeys(("stage", "error", "progress", "report", "started_at", "finished_at"))
    return json.dumps(job | nothing | {"epoch": 1, "created_at": 0.0} | more).encode()


class Answers:
    """Gives its answers one after another and remembers what was asked."""

    def __init__(self, *bodies):
        self.bodies, self.calls = list(bodies), []

    def send(self, call):
        self.calls.append(call)
        return call.parse(self.bodies.pop(0))

    def stream(self, call, sink):
        raise NotImplementedError


@pytest.fixture
def report():
    whole = Report.model_validate_json((Path(__file__).parent / "report.json").read_text())
    fields = {name: getattr(whole, name) for name in DiagnosisReport.model_fields if hasattr(whole, name)}
    return DiagnosisReport.model_validate(fields | {"object": "diagnosis.report", "needed": True})


def test_a_bare_name_is_a_model_and_only_what_was_given_is_sent():
    answers = Answers(row(1, "queued"))
    assert Diagnoses(answers).create(student="s", teacher="t", seed=3).state == "queued"
    (call,) = answers.calls
    assert (call.method, call.path, call.json) == ("POST", "/v1/diagnoses", MODELS | {"seed": 3})


def test_a_field_of_training_is_refused_before_anything_is_sent():
    answers = Answers()
    with pytest.raises(ValidationError):
        Diagnoses(answers).create(student="s", teacher="t", training={"steps": 3})
    assert answers.calls == []


def test_waiting_polls_with_what_was_seen_and_tells_the_progress(report):
    progress = {"stage": "diagnose", "done": 3, "total": 9, "unit": "sequences", "eta_seconds": None}
    told = []
    answers = Answers(
        row(1, "queued"),
        b"",
        row(2, "running", progress=progress),
        row(3, "succeeded", report=report.model_dump(mode="json")),
    )
    found = Diagnoses(answers).wait("dia_1", on_progress=told.append)
    assert found.report == report and [point.done for point in told] == [3]
    conditions = [dict(call.headers).get("If-None-Match") for call in answers.calls]
    assert conditions == [None, '"1"', '"1"', '"2"']


def test_a_diagnosis_that_failed_raises_its_reason():
    error = {"code": "empty_dataset", "message": "No prompt is left."}
    with pytest.raises(JobFailedError, match="Diagnosis dia_1 failed in stage diagnose: No prompt is left"):
        Diagnoses(Answers(row(1, "failed", stage="diagnose", error=error))).wait("dia_1")


def test_patience_has_an_end():
    with pytest.raises(WaitTimeoutError, match="Diagnosis dia_1 is still running"):
        Diagnoses(Answers(row(1, "running"))).wait("dia_1", timeout=0)


def test_it_is_printed_with_measures_and_layers(report):
    console = Console(width=140, record=True, file=StringIO())
    print_diagnosis(report, console)
    text = console.export_text()
    assert f"damage: {report.damage.kind}; there is something to recover" in text
    assert report.measures[0].label in text and report.alignment.student_layers[-1] in text
