"""`/v1/diagnoses`: the same ledger and workers as recoveries, and never mistaken for one."""

import json
from pathlib import Path

import pytest

from recoup.schemas import Diagnosis, Problem, Report
from recoup_jobs.artifacts import publish
from recoup_jobs.stores import open_store

SAMPLE = Path(__file__).parents[1] / "recoup" / "report.json"


@pytest.fixture
def report():
    """The report of a diagnosis."""
    whole = Report.model_validate_json(SAMPLE.read_text()).model_dump(mode="json")
    shared = ("damage", "measures", "alignment", "remarks", "splits", "samples", "cost", "provenance")
    return {name: whole[name] for name in shared} | {
        "object": "diagnosis.report",
        "created_at": 1.0,
        "needed": True,
    }


@pytest.fixture
def diagnosis(client, body):
    """A queued diagnosis."""
    answer = client.post("/v1/diagnoses", json=body | {"alignment": {"positions": 512}})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/diagnoses/{answer.json()['id']}"
    return answer.json()


@pytest.fixture
def finished(diagnosis, ledger, settings, tmp_path, report):
    """The id of a diagnosis that succeeded."""
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    contents = {"report.json": json.dumps(report), "alignment.json": json.dumps(report["alignment"])}
    contents |= {f"alignment.{suffix}": suffix for suffix in ("csv", "svg", "png")}
    files = {name: tmp_path / name for name in contents}
    for name, path in files.items():
        path.write_text(contents[name])
    place = f"{claim.job_id}/e1/package"
    publish(open_store(settings), place, files)
    ledger.commit_stage(claim, "package", place)
    ledger.succeed(claim, None)
    return claim.job_id


def test_a_diagnosis_is_queued_with_its_own_request(diagnosis):
    found = Diagnosis.model_validate(diagnosis)
    assert (found.object, found.state, found.report) == ("diagnosis", "queued", None)
    assert found.id.startswith("dia_") and found.request.alignment.positions == 512
    assert "training" not in diagnosis["request"] and "outcome" not in diagnosis


def test_a_worker_claims_it_like_any_job(diagnosis, ledger):
    assert ledger.due(60.0) == [(diagnosis["id"], "gpu.cpu")]
    assert ledger.claim("worker", ["gpu.cpu"], 30).job_id == diagnosis["id"]


def test_its_report_comes_with_it_once_it_succeeded(finished, client, report):
    found = Diagnosis.model_validate(client.get(f"/v1/diagnoses/{finished}").json())
    assert found.state == "succeeded"
    assert found.report.model_dump(mode="json") == report


@pytest.mark.parametrize(
    ("accept", "type"),
    [
        ("application/json", "application/json"),
        ("text/csv", "text/csv; charset=utf-8"),
        ("image/svg+xml", "image/svg+xml"),
        ("image/png", "image/png"),
    ],
)
def test_its_alignment_comes_as_data_table_or_picture(finished, client, accept, type):
    answer = client.get(f"/v1/diagnoses/{finished}/alignment", headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, type)


def test_its_alignment_is_not_there_before_it_ended(diagnosis, client):
    problem = Problem.model_validate(client.get(f"/v1/diagnoses/{diagnosis['id']}/alignment").json())
    assert (problem.status, problem.code) == (409, "not_finished")
    assert "the diagnosis is queued" in problem.detail


def test_a_known_state_is_not_sent_again(diagnosis, client):
    answer = client.get(
        f"/v1/diagnoses/{diagnosis['id']}", headers={"if-none-match": f'"{diagnosis["version"]}"'}
    )
    assert (answer.status_code, answer.content) == (304, b"")


def test_it_can_be_cancelled_and_has_a_history(diagnosis, client):
    assert client.post(f"/v1/diagnoses/{diagnosis['id']}/cancel").json()["state"] == "cancelled"
    events = client.get(f"/v1/diagnoses/{diagnosis['id']}/events").json()["data"]
    assert [event["data"]["state"] for event in events] == ["queued", "cancelled"]


def test_it_is_no_recovery_and_a_recovery_is_no_diagnosis(diagnosis, client, body):
    recovery = client.post("/v1/recoveries", json=body).json()
    assert [item["id"] for item in client.get("/v1/recoveries").json()["data"]] == [recovery["id"]]
    for path, code in (
        (f"/v1/recoveries/{diagnosis['id']}", "recovery_not_found"),
        (f"/v1/recoveries/{diagnosis['id']}/events", "recovery_not_found"),
        (f"/v1/diagnoses/{recovery['id']}", "diagnosis_not_found"),
        (f"/v1/diagnoses/{recovery['id']}/alignment", "diagnosis_not_found"),
        ("/v1/diagnoses/dia_" + "0" * 24, "diagnosis_not_found"),
        ("/v1/diagnoses/nothing", "diagnosis_not_found"),
    ):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, code)
    assert client.post(f"/v1/recoveries/{diagnosis['id']}/cancel").status_code == 404


@pytest.mark.parametrize(
    ("change", "pointer", "code"),
    [
        ({"training": {"steps": 3}}, "/training", "unknown_field"),
        ({"alignment": {"weight": 0.5}}, "/alignment/weight", "unknown_field"),
        ({"student": {"source": "nowhere"}}, "/student/source", "model_not_found"),
        (
            {"evaluation": {"tasks": [{"name": "sums", "file": "file-" + "0" * 24}]}},
            "/evaluation/tasks/0/file",
            "file_not_found",
        ),
    ],
)
def test_what_cannot_be_accepted_is_named_by_its_place(client, body, ledger, change, pointer, code):
    answer = client.post("/v1/diagnoses", json=body | change)
    assert answer.status_code == 422
    assert [(item["pointer"], item["code"]) for item in answer.json()["errors"]] == [(pointer, code)]
    assert ledger.due(60.0) == []


def test_a_diagnosis_is_steered_as_a_recovery_is(client, diagnosis):
    url = f"/v1/diagnoses/{diagnosis['id']}"
    assert client.post(f"{url}/pause").json()["state"] == "paused"
    assert client.patch(url, json={"priority": 7}).json()["request"]["priority"] == 7
    assert client.post(f"{url}/resume").json()["state"] == "queued"
    assert client.post(f"{url}/cancel").json()["state"] == "cancelled"
    again = client.post(f"{url}/retry")
    assert (again.status_code, again.json()["retry_of"]) == (202, diagnosis["id"])
    assert again.headers["location"] == f"/v1/diagnoses/{again.json()['id']}"


def test_diagnoses_are_listed_apart_from_recoveries(client, diagnosis, job):
    assert [one["id"] for one in client.get("/v1/diagnoses").json()["data"]] == [diagnosis["id"]]
    assert [one["id"] for one in client.get("/v1/recoveries").json()["data"]] == [job["id"]]


def test_the_events_of_a_diagnosis_are_streamed_to_its_end(client, diagnosis):
    url = f"/v1/diagnoses/{diagnosis['id']}"
    client.post(f"{url}/cancel")
    stream = client.get(f"{url}/events", headers={"accept": "text/event-stream"}).text
    assert [line for line in stream.splitlines() if line.startswith("event:")] == [
        "event: state",
        "event: state",
        "event: end",
    ]
