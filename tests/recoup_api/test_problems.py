import errno

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from recoup.schemas import Problem
from recoup_api.app import create_app


@pytest.fixture
def failing(settings, ledger):
    """The service with a route that fails as it is told."""

    def failing(error):
        app = create_app(settings, ledger)

        @app.get("/fail")
        def fail():
            raise error

        return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False).get("/fail")

    return failing


def test_an_unknown_path_is_a_problem_too(client):
    answer = client.get("/nowhere")
    assert answer.headers["content-type"] == "application/problem+json"
    assert Problem.model_validate(answer.json()).code == "not_found"


def test_what_nobody_foresaw_is_told_by_its_request_id_only(failing):
    answer = failing(RuntimeError("password hunter2"))
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "hunter2" not in answer.text


def test_a_database_that_is_away_is_worth_another_try(failing):
    answer = failing(OperationalError("SELECT secret", {}, Exception("connection refused")))
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert "secret" not in answer.text


def test_a_full_disk_is_named(failing):
    assert failing(OSError(errno.ENOSPC, "No space left on device")).json()["code"] == "storage_full"


def test_another_error_of_the_system_is_told_by_its_request_id_only(failing):
    answer = failing(PermissionError(errno.EACCES, "denied", "/secret/path"))
    assert answer.json()["code"] == "internal_error"
    assert "secret" not in answer.text
