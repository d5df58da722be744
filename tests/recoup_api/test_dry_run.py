"""A dry run tells plan, findings and estimate, and leaves no trace."""

import json

import pytest
from sqlalchemy import func, select

from recoup.schemas import DryRun
from recoup_jobs import calibration
from recoup_jobs.calibration import Measured
from recoup_jobs.tables import metadata

STAGES = ("diagnose", "generate", "distil", "evaluate", "package")


@pytest.fixture
def dry_run(client):
    def ask(body):
        answer = client.post("/v1/recoveries?dry_run=true", json=body)
        assert answer.status_code == 200, answer.text
        return DryRun.model_validate(answer.json())

    return ask


def rows_in(ledger):
    with ledger.reading() as conn:
        return {
            table.name: conn.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        }


def chosen(found):
    return {choice.name: choice.value for choice in found.plan}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_it_writes_nothing_and_queues_nothing(dry_run, body, ledger):
    before = rows_in(ledger)
    assert dry_run(body).findings == []
    assert rows_in(ledger) == before
    assert ledger.due(60) == []


def test_it_settles_every_auto_with_a_reason(dry_run, body):
    found = dry_run(body)
    assert {"damage": "finetuning", "method": "off_policy", "mode": "lora", "steps": "24"}.items() <= chosen(
        found
    ).items()
    assert all(choice.why for choice in found.plan)


def test_what_is_asked_for_is_what_is_planned(dry_run, body):
    asked = {"method": {"type": "on_policy"}, "training": {"steps": 7, "mode": "dora"}, "damage": "pruning"}
    found = chosen(dry_run(body | asked))
    assert (found["damage"], found["method"], found["steps"]) == ("pruning", "on_policy", "7")
    assert found["mode"] == "dora"


def test_a_method_tells_for_which_damage_it_is(dry_run, body):
    assert chosen(dry_run(body | {"method": {"type": "reconstruct"}}))["damage"] == "pruning"


def test_a_method_that_cannot_be_is_a_finding(dry_run, body):
    found = dry_run(body | {"damage": "pruning", "method": {"type": "interpolate"}})
    assert [(item.pointer, item.code) for item in found.findings] == [("/method/type", "unsupported_request")]
    assert (found.plan, found.estimate) == ([], None)


def test_it_tells_all_findings_at_once(dry_run, body, write_model):
    write_model("other", tokens=("x", "y"), hidden_size=8)
    asked = {"student": {"source": "other"}, "prompts": {"file": f"file-{'0' * 24}"}}
    found = {(item.pointer, item.code) for item in dry_run(body | asked).findings}
    assert {
        ("/student/source", "vocabulary_mismatch"),
        ("/student/source", "incompatible_models"),
        ("/prompts/file", "file_not_found"),
    } <= found


def test_its_findings_are_those_of_the_request_itself(client, dry_run, body):
    asked = body | {"teacher": {"source": "nowhere"}, "keep": {"file": f"file-{'0' * 24}"}}
    refused = client.post("/v1/recoveries", json=asked).json()
    assert [item.model_dump() for item in dry_run(asked).findings] == refused["errors"]


DORA = {"training": {"mode": "dora"}}
PLACE, CODE = "/training/mode", "dora_not_servable"


def test_it_warns_of_what_vllm_could_not_serve(client, dry_run, body):
    found = dry_run(body | DORA)
    assert [(item.pointer, item.code) for item in found.warnings] == [(PLACE, CODE)]
    assert found.findings == []
    assert client.post("/v1/recoveries", json=body | DORA).status_code == 202
    assert dry_run(body).warnings == []


def test_what_must_be_servable_and_is_not_is_refused(client, dry_run, body):
    asked = body | DORA | {"output": {"servable": True}}
    found = dry_run(asked)
    refused = client.post("/v1/recoveries", json=asked)
    assert (refused.status_code, refused.json()["code"]) == (422, CODE)
    assert [item.model_dump() for item in found.findings] == refused.json()["errors"]
    assert found.warnings == []
    served = body | {"output": {"servable": True}}
    assert client.post("/v1/recoveries", json=served).status_code == 202


def test_a_body_that_is_none_is_refused_all_the_same(client, body):
    assert client.post("/v1/recoveries?dry_run=true", json=body | {"foo": 1}).status_code == 422
    assert client.post("/v1/recoveries?dry_run=maybe", json=body).status_code == 422


@pytest.mark.parametrize("key", ["", "a b", "k" * 256])
def test_a_key_that_is_none_is_refused_here_too(client, body, key):
    headers = {"idempotency-key": key}
    refused = client.post("/v1/recoveries?dry_run=true", json=body, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_idempotency_key")


def test_more_steps_take_more(dry_run, body):
    few, many = (dry_run(body | {"training": {"steps": steps}}).estimate for steps in (8, 800))
    assert few.tokens < many.tokens


def test_a_teaching_is_planned_and_estimated_and_its_files_are_checked(dry_run, client, body):
    def uploaded(rows):
        content = "\n".join(json.dumps({"prompt": f"{n}?", "completion": "yes"}) for n in range(rows))
        data = {"purpose": "fine-tune"}
        return client.post("/v1/files", data=data, files={"file": ("rows.jsonl", content)}).json()["id"]

    healthy = {"student": body["student"], "teacher": body["student"]}
    found = dry_run(healthy | {"teach": {"file": uploaded(800)}})
    assert found.findings == [] and found.estimate.tokens > 0
    assert {"method": "rewrite_sft", "rehearsal": "general prompts", "steps": "71"}.items() <= chosen(
        found
    ).items()
    few = dry_run(healthy | {"teach": {"file": uploaded(60), "held_out": "file-" + "0" * 24}})
    assert [(item.pointer, item.code) for item in few.findings] == [("/teach/held_out", "file_not_found")]


def test_without_a_finished_recovery_there_is_no_time(dry_run, body):
    estimate = dry_run(body).estimate
    assert (estimate.seconds, estimate.calibrated_on) == (None, 0)


def test_a_finished_recovery_gives_the_time(dry_run, body, ledger):
    rows = [Measured(stage, "lora", 12, 1e6, 2.0) for stage in STAGES]
    calibration.record(ledger, "gpu.cpu", "rec_1", rows)
    calibration.record(ledger, "gpu.h100", "rec_2", rows)
    estimate = dry_run(body).estimate
    assert estimate.seconds > 0
    assert estimate.calibrated_on == 1


def test_its_answer_is_documented(client):
    answers = client.app.openapi()["paths"]["/v1/recoveries"]["post"]["responses"]
    example = answers["200"]["content"]["application/json"]["example"]
    assert DryRun.model_validate_json(json.dumps(example)).plan
