import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from recoup_api.app import create_app
from recoup_api.idempotency import InFlightKeys
from recoup_jobs.answers import Request
from recoup_jobs.errors import InFlight
from recoup_jobs.ledger import open_ledger
from recoup_jobs.tables import DEFAULT_TENANT

KEY = {"idempotency-key": "one"}


def test_the_same_request_is_done_once_and_answered_twice(client, ledger, body):
    first, second = (client.post("/v1/recoveries", json=body, headers=KEY) for _ in range(2))
    assert first.status_code == second.status_code == 202
    assert first.content == second.content
    assert first.headers["location"] == second.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert len(ledger.list(None, 10).data) == 1


def test_a_retry_is_done_once_under_its_key_and_each_time_without(client, ledger, job):
    client.post(f"/v1/recoveries/{job['id']}/cancel")
    url = f"/v1/recoveries/{job['id']}/retry"
    first, second = (client.post(url, headers=KEY) for _ in range(2))
    assert (first.status_code, first.content) == (202, second.content)
    assert first.headers["location"] == second.headers["location"]
    assert second.headers["idempotent-replayed"] == "true"
    assert first.json()["retry_of"] == job["id"]
    assert client.post(url).json()["id"] != first.json()["id"]
    assert len(ledger.list(None, 10).data) == 3


def test_the_key_of_a_retry_serves_no_other(client, ledger, body):
    jobs = [client.post("/v1/recoveries", json=body).json()["id"] for _ in range(2)]
    for id in jobs:
        client.post(f"/v1/recoveries/{id}/cancel")
    assert client.post(f"/v1/recoveries/{jobs[0]}/retry", headers=KEY).status_code == 202
    refused = client.post(f"/v1/recoveries/{jobs[1]}/retry", headers=KEY)
    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert len(ledger.list(None, 10).data) == 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"metadata": {"k": "v"}}])
def test_another_request_under_the_key_is_refused(client, ledger, body, change):
    client.post("/v1/recoveries", json=body, headers=KEY)
    refused = client.post("/v1/recoveries", json=body | change, headers=KEY)
    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert len(ledger.list(None, 10).data) == 1


def test_what_was_refused_is_not_kept(client, body):
    for wrong in ({"seed": -1}, {"student": {"source": "no"}}):
        assert client.post("/v1/recoveries", json=body | wrong, headers=KEY).status_code == 422
    assert client.post("/v1/recoveries", json=body, headers=KEY).status_code == 202


@pytest.mark.parametrize("key", ["x" * 256, "x" * 10_000, "a b", "é".encode(), ""])
def test_a_key_that_is_none_is_refused(client, body, key):
    refused = client.post("/v1/recoveries", json=body, headers={"idempotency-key": key})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_idempotency_key")


def test_a_request_is_alone_with_its_key():
    keys, asked = InFlightKeys(), Request("ours", "one", "")
    with keys.alone(asked):
        with pytest.raises(InFlight) as refusal, keys.alone(asked):
            pass
        assert (refusal.value.status, refusal.value.retry_after) == (409, 1)
        with keys.alone(Request("theirs", "one", "")):
            pass
    with keys.alone(asked):
        pass


def test_a_request_whose_key_is_at_work_may_be_tried_again_soon(client, body, ledger):
    with client.app.state.in_flight.alone(Request(DEFAULT_TENANT, "one", "")):
        refused = client.post("/v1/recoveries", json=body, headers=KEY)
    assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_in_flight")
    assert refused.headers["retry-after"] == "1"
    assert ledger.list(None, 10).data == []


def test_an_upload_is_stored_once_whatever_its_boundary(client, settings):
    def upload(content):
        form = {"files": {"file": ("a", content)}, "data": {"purpose": "fine-tune"}}
        return client.post("/v1/files", headers=KEY, **form)

    first, second = upload(b'{"prompt": "a"}'), upload(b'{"prompt": "a"}')
    assert first.content == second.content
    assert upload(b'{"prompt": "b"}').json()["code"] == "idempotency_key_reused"
    assert len(list(settings.files_dir.iterdir())) == 1


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)  # a hundred connections cost half a minute
def test_a_hundred_threads_with_one_key_make_one_job_and_get_one_answer(serve, settings, body):
    ledgers = [open_ledger(settings) for _ in range(2)]
    urls = [serve(create_app(settings, ledger)) for ledger in ledgers]
    for url in urls:
        httpx2.get(f"{url}/healthz")  # FastAPI builds routes then, and cannot for two apps at once

    def create(number):
        headers = KEY | {"content-type": "application/json"}
        while True:
            where = f"{urls[number % 2]}/v1/recoveries"
            answer = http.post(where, content=json.dumps(body), headers=headers)
            if answer.status_code != 409:
                return answer.status_code, answer.content
            assert answer.headers["retry-after"] == "1"
            time.sleep(1)

    as_many_as_ask = httpx2.Limits(max_connections=None)
    with ThreadPoolExecutor(100) as pool, httpx2.Client(timeout=60, limits=as_many_as_ask) as http:
        answers = set(pool.map(create, range(100)))
    assert [status for status, _ in answers] == [202]
    assert len(ledgers[0].list(None, 10).data) == 1
    for ledger in ledgers:
        ledger.close()
