import time

import pytest
from fastapi.testclient import TestClient

from recoup_api.app import create_app


def test_the_service_is_alive_and_ready(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_service_is_not_ready_without_its_database(settings, ledger, tmp_path):
    app = create_app(settings, ledger)
    ledger.close()
    settings.home.rename(tmp_path / "elsewhere")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").json()["code"] == "database_unavailable"


def test_capabilities_name_the_models_below_the_roots(client, body):
    known = client.get("/v1/capabilities").json()
    assert known["models"] == ["student", "teacher"]
    assert known["damages"] == ["finetuning", "quantization", "pruning"]
    assert "off_policy" in known["methods"]


@pytest.mark.parametrize("sweep", [True, False])
def test_a_new_recovery_is_hinted_at_by_whoever_sweeps(settings, ledger, body, sweep):
    hints = []
    app = create_app(settings, ledger, publish=lambda *hint: hints.append(hint), sweep=sweep)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        job = client.post("/v1/recoveries", json=body).json()
        deadline = time.monotonic() + (5 if sweep else 0.2)
        while not hints and time.monotonic() < deadline:
            time.sleep(0.01)
    assert hints == ([(job["id"], "gpu.cpu")] if sweep else [])


def test_a_sweeper_that_died_makes_the_service_unready(settings, ledger, monkeypatch):
    app = create_app(settings, ledger, publish=lambda *hint: None)
    client = TestClient(app, base_url="http://127.0.0.1")  # never entered: the sweeper was not started
    assert client.get("/readyz").json()["code"] == "sweeper_stopped"


def test_a_reconciler_that_died_makes_the_service_unready(serving_settings, ledger):
    client = TestClient(create_app(serving_settings, ledger), base_url="http://127.0.0.1")  # never entered
    assert client.get("/readyz").json()["code"] == "reconciler_stopped"


def test_the_documentation_describes_the_body_of_a_recovery(client):
    post = client.get("/openapi.json").json()["paths"]["/v1/recoveries"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CreateRecoveryInput"}
