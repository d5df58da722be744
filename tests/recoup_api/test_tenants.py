"""Two tenants, all routes: what one has, the other cannot see, name, count or change."""

import re
import time

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from recoup.schemas import Launch, Lineage
from recoup_api.app import create_app
from recoup_jobs.deployments import Deployments, NewDeployment, new_id
from recoup_jobs.keys import SCOPES, NewKey, create_key, list_keys, revoke_key
from recoup_jobs.tables import api_keys

ROWS = b'{"prompt": "What is it?"}\n'


@pytest.fixture
def app(settings, ledger):
    return create_app(settings, ledger)


@pytest.fixture
def holder(app, ledger):
    """A client with a key of its own."""

    def client(tenant="ours", scopes=SCOPES, **more):
        key = create_key(ledger, NewKey(tenant, "test", tuple(scopes), **more))
        return TestClient(app, base_url="http://recoup.example", headers={"authorization": f"Bearer {key}"})

    return client


KINDS = ("recovery", "diagnosis", "file", "webhook", "deployment", "model")
NOT_FOUND = {f"{kind}_not_found" for kind in KINDS}


def upload(client):
    form = {"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
    return client.post("/v1/files", **form).json()["id"]


def addresses(app, ids):
    """(method, path) of every route that names a thing by its id, with an id of that kind filled in."""
    for path, methods in app.openapi()["paths"].items():
        kind = re.match(r"/v1/(\w+)", path)
        if "{" in path and kind:
            named = path.replace("{id}", ids[kind.group(1)])
            yield from ((method, re.sub(r"\{\w+\}", "report.json", named)) for method in methods)


def test_what_a_tenant_has_is_unknown_to_another(app, ledger, holder, body):
    ours, theirs = holder("ours"), holder("theirs")
    ids = {"files": upload(ours), "recoveries": ours.post("/v1/recoveries", json=body).json()["id"]}
    ids["fine_tuning"] = ids["recoveries"]
    models = {name: body[name] for name in ("student", "teacher")}
    ids["diagnoses"] = ours.post("/v1/diagnoses", json=models).json()["id"]
    ids["webhooks"] = ours.post("/v1/webhooks", json={"url": "https://93.184.216.34/"}).json()["id"]
    lineage = Lineage(recovery=ids["recoveries"], student="s", teacher="t", outcome="recovered")
    new = NewDeployment(new_id(), "ours", "m", "adapter", lineage, Launch(arguments=[], environment={}))
    ids["deployments"], ids["models"] = Deployments(ledger, []).add(new, 1).id, new.name
    ledger.claim("worker", ["gpu.cpu"], 30)
    before = ours.get(f"/v1/recoveries/{ids['recoveries']}").json()
    for method, path in addresses(app, ids):
        answer = theirs.request(method, path, json={})
        assert answer.status_code == 404, (method, path)
        assert answer.json()["code"] in NOT_FOUND
    assert ours.get(f"/v1/recoveries/{ids['recoveries']}").json() == before
    assert ours.get(f"/v1/files/{ids['files']}").status_code == 200


def test_lists_hold_what_is_the_callers(holder, body):
    ours, theirs = holder("ours"), holder("theirs")
    upload(ours)
    ours.post("/v1/recoveries", json=body)
    for list_ in ("/v1/files", "/v1/recoveries", "/v1/fine_tuning/jobs"):
        assert (len(ours.get(list_).json()["data"]), theirs.get(list_).json()["data"]) == (1, [])


def test_a_recovery_cannot_name_the_file_of_another_tenant(holder, body):
    file = upload(holder("ours"))
    tasks = [{"name": "t", "file": file}]
    refused = holder("theirs").post(
        "/v1/recoveries",
        json=body
        | {"prompts": {"file": file}, "keep": {"file": file}}
        | {"evaluation": {"natural_text": {"file": file}, "tasks": tasks}},
    )
    assert (refused.status_code, refused.json()["code"]) == (422, "file_not_found")
    places = ["/prompts/file", "/keep/file", "/evaluation/natural_text/file", "/evaluation/tasks/0/file"]
    assert [item["pointer"] for item in refused.json()["errors"]] == places


def test_a_cursor_of_another_tenant_is_refused(holder):
    file = upload(holder("ours"))
    assert holder("theirs").get("/v1/files", params={"after": file}).json()["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("jobs:read", "GET", "/v1/recoveries"),
        ("jobs:write", "POST", "/v1/recoveries"),
        ("files:read", "GET", "/v1/files"),
        ("files:write", "DELETE", "/v1/files/file-0"),
        ("models:read", "GET", "/v1/deployments"),
        ("models:write", "POST", "/v1/deployments"),
    ],
)
def test_a_key_without_the_scope_is_told_which(holder, scope, method, path):
    refused = holder(scopes=set(SCOPES) - {scope}).request(method, path)
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
    assert scope in refused.json()["detail"]
    assert holder(scopes=[scope]).request(method, path).status_code != 403


def test_a_key_that_is_none_any_more_is_refused_like_one_that_never_was(app, ledger, holder):
    expired, revoked = holder(expires_at=time.time() - 1), holder()
    revoke_key(ledger, list_keys(ledger)[-1].prefix)
    made_up = TestClient(app, base_url="http://recoup.example", headers={"authorization": "Bearer recoup_x"})
    answers = [
        client.get("/v1/files", headers={"x-request-id": "r"}) for client in (expired, revoked, made_up)
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


def test_a_key_with_another_secret_is_refused(app, ledger):
    key = create_key(ledger, NewKey("ours", "test"))
    client = TestClient(app, base_url="http://recoup.example")
    assert client.get("/v1/files", headers={"authorization": f"Bearer {key}"}).status_code == 200
    other = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert client.get("/v1/files", headers={"authorization": f"Bearer {other}"}).status_code == 401


def test_the_ledger_does_not_know_the_secret(ledger):
    key = create_key(ledger, NewKey("ours", "test"))
    with ledger.reading() as conn:
        assert key.rpartition("_")[2] not in repr(conn.execute(api_keys.select()).all())


def test_once_there_is_a_key_there_is_no_way_without(app, ledger):
    with TestClient(app, base_url="http://127.0.0.1") as client:
        create_key(ledger, NewKey("ours", "test"))
        assert client.get("/v1/files").status_code == 401
        assert client.get("/healthz").status_code == 200
        with ledger.engine.begin() as conn:
            conn.execute(update(api_keys).values(revoked_at=1.0))
        assert client.get("/v1/files").status_code == 401


def test_who_calls_too_often_waits_and_others_do_not(settings, ledger):
    slow = settings.model_copy(update={"requests_per_second": 0.1, "request_burst": 3})
    app = create_app(slow, ledger)
    keys = [create_key(ledger, NewKey("ours", name)) for name in "ab"]
    eager, calm = (
        TestClient(app, base_url="http://recoup.example", headers={"authorization": f"Bearer {key}"})
        for key in keys
    )
    answers = [eager.get("/v1/files") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
    assert answers[-1].json()["code"] == "rate_limited"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 10
    assert [int(re.search(r"r=(\d+)", answer.headers["ratelimit"]).group(1)) for answer in answers] == [
        2,
        1,
        0,
        0,
        0,
    ]
    assert re.fullmatch(r'"key";q=3;w=\d+', answers[0].headers["ratelimit-policy"])
    assert calm.get("/v1/files").status_code == 200


def test_a_tenant_that_has_enough_waits(settings, ledger, body):
    small = settings.model_copy(update={"max_live_jobs": 1, "max_stored_bytes": 1})
    with TestClient(create_app(small, ledger), base_url="http://127.0.0.1") as client:
        client.post("/v1/recoveries", json=body)
        upload(client)
        form = {"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
        for refused in (client.post("/v1/recoveries", json=body), client.post("/v1/files", **form)):
            assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
            assert refused.headers["retry-after"] == "60"
