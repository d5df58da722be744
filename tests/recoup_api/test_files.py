import json

import pytest
from fastapi.testclient import TestClient

from recoup_api.app import create_app

ROWS = [{"prompt": f"What is {number}?"} for number in range(60)]


def jsonl(rows):
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture
def upload(client):
    def upload(content, name="data.jsonl", purpose="fine-tune"):
        return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})

    return upload


def test_a_file_that_was_uploaded_can_be_read_back(client, upload):
    stored = upload(jsonl(ROWS))
    assert stored.status_code == 200
    file = stored.json()
    assert (file["rows"], file["filename"], file["purpose"]) == (60, "data.jsonl", "fine-tune")
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == jsonl(ROWS)


def test_an_uploaded_file_can_be_recovered_on(client, upload, body):
    id = upload(jsonl(ROWS)).json()["id"]
    accepted = client.post("/v1/recoveries", json=body | {"prompts": {"file": id}, "keep": {"file": id}})
    assert accepted.status_code == 202


def test_files_are_listed_and_deleted(client, upload):
    ids = [upload(jsonl(ROWS)).json()["id"] for _ in range(2)]
    gone = client.delete(f"/v1/files/{ids[0]}").json()
    assert gone == {"id": ids[0], "object": "file", "deleted": True}
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == ids[1:]
    assert client.get(f"/v1/files/{ids[0]}").status_code == 404


def test_an_empty_data_set_is_refused(client, upload):
    refused = upload(b"\n\n")
    assert (refused.status_code, refused.json()["code"]) == (422, "empty_dataset")
    assert client.get("/v1/files").json()["data"] == []


def test_a_bad_line_is_refused_with_its_number(client, upload):
    refused = upload(jsonl(ROWS[:6]) + b'\n{"prompt": 5}\n' + jsonl(ROWS[6:]))
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_dataset")
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/line/7/prompt"]
    assert "line 7" in refused.json()["detail"]
    assert client.get("/v1/files").json()["data"] == []


def test_an_endless_line_is_refused_with_its_number(upload):
    refused = upload(jsonl(ROWS[:2]) + b'\n{"prompt": "' + b"x" * (3 << 20))
    assert (refused.status_code, refused.json()["code"]) == (422, "line_too_long")
    assert refused.json()["errors"][0]["pointer"] == "/line/3"


def test_an_upload_without_its_file_is_refused(client):
    refused = client.post("/v1/files", data={"purpose": "fine-tune"})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/file")


def test_a_purpose_is_a_word(upload):
    refused = upload(jsonl(ROWS), purpose="<script>")
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/purpose")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\x00b.jsonl", "x" * 300, "größe.jsonl", 'q"u.jsonl'])
def test_a_file_name_is_only_a_name(client, upload, settings, name):
    stored = upload(jsonl(ROWS), name=name)
    assert stored.status_code == 200
    assert client.get(f"/v1/files/{stored.json()['id']}/content").status_code == 200
    assert [path.name for path in settings.files_dir.iterdir()] == [f"{stored.json()['id']}.jsonl"]


def test_a_file_that_a_recovery_needs_cannot_be_deleted(client, upload, body):
    id = upload(jsonl(ROWS)).json()["id"]
    client.post("/v1/recoveries", json=body | {"prompts": {"file": id}})
    refused = client.delete(f"/v1/files/{id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "file_in_use")


def test_a_file_that_is_too_large_is_refused(settings, ledger, monkeypatch):
    monkeypatch.setattr("recoup_api.files.LARGEST_UPLOAD", 1000)
    with TestClient(create_app(settings, ledger), base_url="http://127.0.0.1") as client:
        refused = client.post("/v1/files", files={"file": ("a", b"x" * 2000)}, data={"purpose": "fine-tune"})
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
