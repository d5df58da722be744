import time

from fastapi.testclient import TestClient

from recoup_api.app import create_app
from recoup_jobs.tables import jobs


def test_without_a_broker_jobs_of_vanished_workers_are_still_taken_back(settings, ledger, body):
    with TestClient(create_app(settings, ledger, sweep=True), base_url="http://127.0.0.1") as client:
        made = client.post("/v1/recoveries", json=body).json()
        ledger.claim("worker", ["gpu.cpu"], 0.01)
        until = time.monotonic() + 20
        while client.get(f"/v1/recoveries/{made['id']}").json()["losses"] != 1:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_without_a_broker_no_job_counts_as_untold(settings, ledger, body):
    with TestClient(create_app(settings, ledger, sweep=True), base_url="http://127.0.0.1") as client:
        client.post("/v1/recoveries", json=body)
        until = time.monotonic() + 20
        while not told(ledger):
            assert time.monotonic() < until
            time.sleep(0.02)


def told(ledger):
    with ledger.reading() as conn:
        return conn.execute(jobs.select()).one().published_at
