import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from recoup_api.app import create_app

KEY = "a-key-of-this-test"


@pytest.fixture
def locked(settings, ledger):
    app = create_app(settings.model_copy(update={"api_key": SecretStr(KEY)}), ledger)
    with TestClient(app, base_url="http://recoup.example") as client:
        yield client


def test_every_answer_has_a_request_id(client):
    for path in ("/healthz", "/v1/recoveries", "/nowhere", "/v1/recoveries?limit=0"):
        assert client.get(path).headers["x-request-id"].startswith("req_")


def test_a_request_may_bring_its_own_id(client):
    answer = client.get("/v1/files/none", headers={"x-request-id": "job-1:epoch-2"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "job-1:epoch-2"


@pytest.mark.parametrize("id", ["", "a b", "x" * 129, "<script>"])
def test_an_id_that_is_no_id_is_replaced(client, id):
    assert client.get("/healthz", headers={"x-request-id": id}).headers["x-request-id"] != id


def test_the_right_key_opens(locked):
    assert locked.get("/v1/recoveries", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "authorization", ["", KEY, f"Basic {KEY}", "Bearer ", "Bearer wrong", f"Bearer {KEY}x"]
)
@pytest.mark.parametrize("path", ["/v1/recoveries", "/v1/files", "/v1/capabilities", "/v1/nowhere"])
def test_without_the_right_key_nothing_opens(locked, path, authorization):
    refused = locked.get(path, headers={"authorization": authorization})
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["x-request-id"] == refused.json()["request_id"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_key(locked, path):
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "[::1]"]
)
def test_without_a_key_this_machine_is_served(client, host):
    assert client.get("/v1/recoveries", headers={"host": host}).status_code == 200


def test_where_there_is_no_key_one_that_a_client_cannot_leave_out_is_passed_over(client):
    sent = {"authorization": "Bearer whatever the openai package was given"}
    assert client.get("/v1/recoveries", headers=sent).status_code == 200
    assert client.get("/v1/recoveries", headers=sent | {"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""]
)
def test_without_a_key_another_name_is_refused(client, host):
    refused = client.get("/v1/recoveries", headers={"host": host})
    assert (refused.status_code, refused.json()["code"]) == (400, "host_not_allowed")
