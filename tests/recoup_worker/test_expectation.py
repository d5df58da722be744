"""What a job's preflight leaves: what the recovery will take, and whether vLLM could serve it."""

import pytest

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.ledger import open_ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.settings import Settings
from recoup_worker.expectation import expect, expected


@pytest.fixture(scope="module")
def settings(tmp_path_factory, write_tiny_models):
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    write_tiny_models(settings.model_roots[0])
    return settings


@pytest.fixture
def checked(settings, tmp_path):
    """The estimate of a job's preflight, and what it said in the log."""

    def check(**asked):
        models = {"student": ModelRef(source="student"), "teacher": ModelRef(source="teacher")}
        request = CreateRecovery.model_validate(models | asked)
        ledger = open_ledger(settings)
        id = ledger.create(request, settings.queue).id
        claim = ledger.claim("worker", [settings.queue], 30)
        expect(claim, preflight(request, ledger, settings), ledger, settings, tmp_path)
        said = [event.data["message"] for event in ledger.events(id, 0, 100).data if event.type == "log"]
        ledger.close()
        return expected(tmp_path), said

    return check


def test_an_adapter_that_vllm_could_not_serve_is_told_before_it_is_trained(checked):
    estimate, (said,) = checked(training={"mode": "dora"})
    assert estimate.tokens > 0
    assert said.startswith("/training/mode: vLLM serves no DoRA")


def test_of_one_that_it_could_nothing_is_said(checked):
    assert checked()[1] == []
