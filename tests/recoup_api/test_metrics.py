import pytest
import structlog
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from recoup_api.app import create_app
from recoup_jobs.keys import READ_METRICS, NewKey, create_key

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def counted(client, **labels):
    """How many requests with these labels were answered."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    found = [s.value for s in samples if s.name == "recoup_http_requests_total" and s.labels == labels]
    return sum(found)


def test_requests_are_counted_by_the_template_of_their_route(client, job):
    labels = {"method": "GET", "route": "/v1/recoveries/{id}", "status": "200"}
    before = counted(client, **labels)
    client.get(f"/v1/recoveries/{job['id']}")
    client.get(f"/v1/recoveries/{job['id']}")
    assert counted(client, **labels) == before + 2


def test_what_a_client_makes_up_becomes_no_label(client):
    client.get("/v1/made-up/by-a-client")
    client.request("BREW", "/v1/recoveries")
    text = client.get("/metrics").text
    assert "made-up" not in text and "BREW" not in text


def test_a_request_that_the_door_refuses_is_counted_too(settings, ledger):
    create_key(ledger, NewKey("ours", "test"))
    client = TestClient(create_app(settings, ledger), base_url="http://127.0.0.1")
    key = create_key(ledger, NewKey("ours", "prometheus", (READ_METRICS,)))
    client.headers["authorization"] = f"Bearer {key}"
    before = counted(client, method="GET", route="other", status="401")
    assert client.get("/v1/recoveries", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert counted(client, method="GET", route="other", status="401") == before + 1


@pytest.mark.parametrize(("scopes", "status"), [(None, 403), ((READ_METRICS,), 200)])
def test_metrics_of_all_tenants_need_a_key_made_for_it(settings, ledger, scopes, status):
    new = NewKey("ours", "test") if scopes is None else NewKey("ours", "test", scopes)
    headers = {"authorization": f"Bearer {create_key(ledger, new)}"}
    client = TestClient(create_app(settings, ledger), base_url="http://127.0.0.1", headers=headers)
    assert client.get("/metrics").status_code == status


def test_a_job_belongs_to_the_trace_of_the_request_that_made_it(client, ledger, body):
    made = client.post("/v1/recoveries", json=body, headers={"traceparent": PARENT}).json()
    assert ledger.traceparent(made["id"]).split("-")[1] == PARENT.split("-")[1]


def test_what_a_request_logs_carries_its_ids_in_a_thread_too(client):
    bound = []

    @client.app.get("/probe")
    def probe():
        bound.append(structlog.contextvars.get_contextvars())
        return {}

    client.get("/probe", headers={"x-request-id": "req-7", "traceparent": PARENT})
    assert bound == [{"request_id": "req-7", "trace_id": PARENT.split("-")[1]}]
