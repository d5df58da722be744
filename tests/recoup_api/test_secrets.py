"""A secret that was given to the service is found nowhere again: no log, no event, no problem, no row."""

import logging

import pytest
from fastapi.testclient import TestClient

from recoup_api.app import create_app
from recoup_jobs.keys import NewKey, create_key
from recoup_jobs.tables import metadata

PASTED = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/recoveries", {"metadata": {"token": PASTED}}),
        ("/v1/recoveries?dry_run=true", {"metadata": {"token": f"Bearer {PASTED}"}}),
        ("/v1/diagnoses", {"metadata": {"db": "postgresql://me:pa55w0rd@host/db"}}),
    ],
)
def test_a_secret_in_a_request_is_refused_and_not_told(client, ledger, body, path, change):
    refused = client.post(path, json=body | change)
    (item,) = refused.json()["errors"]
    assert (refused.status_code, item["code"]) == (422, "secret_refused")
    assert item["pointer"].startswith("/metadata/")
    assert PASTED not in refused.text and "pa55w0rd" not in refused.text
    assert ledger.list(None, 10).data == []


def test_a_secret_is_not_patched_in(client, job):
    refused = client.patch(f"/v1/recoveries/{job['id']}", json={"metadata": {"token": PASTED}})
    assert refused.json()["code"] == "secret_refused"


def test_a_secret_in_an_error_is_kept_nowhere(client, ledger, claim):
    ledger.event(claim, "log", {"message": f"cannot reach redis://:{PASTED}@host", "deep": [{"a": PASTED}]})
    ledger.fail(claim, "internal_error", f"HTTPError: Bearer {PASTED}", retry=False)
    url = f"/v1/recoveries/{claim.job_id}"
    told = client.get(url).text + client.get(f"{url}/events").text
    assert "HTTPError: Bearer [secret]" in told
    with ledger.reading() as conn:
        rows = [repr(conn.execute(table.select()).all()) for table in metadata.sorted_tables]
    assert PASTED not in told + "".join(rows)


def test_no_secret_is_kept_logged_or_told(settings, ledger, body, caplog):
    caplog.set_level(logging.DEBUG)
    key = create_key(ledger, NewKey("ours", "test"))
    app = create_app(settings, ledger)
    bearer = {"authorization": f"Bearer {key}"}
    with TestClient(app, base_url="http://recoup.example", headers=bearer) as client:
        webhook = client.post("/v1/webhooks", json={"url": "https://93.184.216.34/"}).json()
        job = client.post("/v1/recoveries", json=body, headers={"idempotency-key": "one"}).json()
        told = [client.get(f"/v1/recoveries/{job['id']}/events").text, client.get("/v1/webhooks").text]
        told += [client.post(path, content=key).text for path in ("/v1/recoveries", "/v1/files", "/v1/none")]
        told += [client.get("/v1/files", headers={"authorization": f"Bearer {key}x"}).text]
    with ledger.reading() as conn:
        rows = [repr(conn.execute(table.select()).all()) for table in metadata.sorted_tables]
    for secret in (key.rpartition("_")[2], webhook["secret"], app.state.secret.decode()):
        assert not any(secret in text for text in (*rows, *told, caplog.text))
    assert job["id"] in "".join(rows)
    assert (settings.home / "secret").stat().st_mode & 0o777 == 0o600
