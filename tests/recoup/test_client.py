"""`Client` against a live server on loopback: every endpoint, every kind of trouble."""

import threading
import time

import pytest
from pydantic import ValidationError

import recoup
from recoup import Client, CreateRecovery

ASK = {"student": "damaged", "teacher": "healthy"}


def test_a_str_names_the_source_of_a_model(client, service):
    job = client.recoveries.create(**ASK, seed=7)
    assert (job.state, job.request.student.source, job.request.seed) == ("queued", "damaged", 7)


def test_a_ready_request_is_taken_as_it_is(client):
    request = CreateRecovery.model_validate({"student": {"source": "a"}, "teacher": {"source": "b"}})
    assert client.recoveries.create(request).request == request
    with pytest.raises(TypeError, match="not both"):
        client.recoveries.create(request, seed=1)


@pytest.mark.parametrize("wrong", [{"seed": "1"}, {"sead": 1}, {"student": "../x"}, {"teacher": None}])
def test_a_wrong_field_is_refused_before_a_byte_leaves(client, service, wrong):
    with pytest.raises(ValidationError):
        client.recoveries.create(**(ASK | wrong))
    assert service.seen == []


def test_a_list_walks_all_pages(client):
    made = [client.recoveries.create(**ASK).id for _ in range(5)]
    assert [job.id for job in client.recoveries.list()] == made
    assert [job.id for job in client.recoveries.list(after=made[1], limit=2)] == made[2:]


def test_a_list_fetches_no_page_that_nobody_reads(client, service):
    for _ in range(5):
        client.recoveries.create(**ASK)
    next(client.recoveries.list())
    assert len(service.sent("GET", "/v1/recoveries")) == 1


def test_a_cancelled_job_ends_cancelled_and_cannot_be_cancelled_again(client):
    job = client.recoveries.create(**ASK)
    assert client.recoveries.cancel(job.id).state == "cancelling"
    assert client.recoveries.wait(job.id).state == "cancelled"
    with pytest.raises(recoup.ConflictError, match="The recovery is cancelled"):
        client.recoveries.cancel(job.id)


def test_a_report_comes_as_a_value_and_as_a_page(client, report):
    job = client.recoveries.create(**ASK)
    assert client.recoveries.report(job.id) == report(job.id)
    assert client.recoveries.report_html(job.id) == "<html>the report</html>"
    assert client.recoveries.alignment(job.id) == report(job.id).alignment


def test_a_recipe_is_python(client):
    job = client.recoveries.create(**ASK)
    assert client.recoveries.recipe(job.id) == 'print("trained: β")\n'


def test_an_uploaded_file_arrives_byte_for_byte(client, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "grüß dich"}\n'.encode() * 3)
    file = client.files.create(path)
    assert (file.filename, file.purpose, file.rows) == ("prompts.jsonl", "recovery", 3)
    assert file.bytes == path.stat().st_size
    assert client.files.get(file.id) == file
    assert [*client.files.list()] == [file]
    client.files.delete(file.id)
    with pytest.raises(recoup.NotFoundError):
        client.files.get(file.id)


def test_capabilities_are_a_value(client):
    assert client.capabilities().version == "0.1.0"


def test_the_environment_names_server_and_key(service, monkeypatch):
    service.key = "rk_secret"
    monkeypatch.setenv("RECOUP_BASE_URL", service.url + "/")
    monkeypatch.setenv("RECOUP_API_KEY", "rk_secret")
    with Client() as client:
        assert client.capabilities().version == "0.1.0"
    with (
        Client(api_key="rk_other") as client,
        pytest.raises(recoup.AuthenticationError, match="asks for a key"),
    ):
        client.capabilities()


@pytest.mark.parametrize("url", ["127.0.0.1:8321", "ftp://host", "http://", "http://[::", "nonsense"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(recoup.InvalidArgumentError, match="address"):
        Client(url)


@pytest.mark.parametrize("key", ["a b", "a\r\nX-Evil: 1", "schlüssel"])
def test_a_key_cannot_smuggle_a_header(key):
    with pytest.raises(recoup.InvalidArgumentError, match="API key"):
        Client(api_key=key)


def test_a_proxy_of_the_environment_does_not_stand_before_loopback(service, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with Client(service.url) as client:
        assert client.capabilities().version == "0.1.0"


def test_a_dropped_get_is_sent_again(client, service, faults):
    service.faults += [faults(), faults()]
    assert client.capabilities().version == "0.1.0"
    assert len(service.seen) == 3


def test_tries_end(service, faults):
    service.faults += [faults()] * 2
    with (
        Client(service.url, max_retries=1) as client,
        pytest.raises(recoup.APIConnectionError, match="broke"),
    ):
        client.capabilities()
    assert len(service.seen) == 2


def test_a_busy_server_is_asked_again_when_it_says(client, service, faults):
    service.faults.append(faults(503, {"Retry-After": "1"}))
    started = time.monotonic()
    client.capabilities()
    assert 1.0 <= time.monotonic() - started < 3.0


@pytest.mark.parametrize("status", [None, 503])
def test_a_post_that_may_have_arrived_is_not_sent_again(client, service, faults, status):
    service.faults.append(faults(status))
    with pytest.raises((recoup.APIConnectionError, recoup.InternalServerError)):
        client.recoveries.create(**ASK)
    assert len(service.seen) == 1


def test_a_post_that_found_nobody_is_sent_again(client, service):
    service.stop()
    starting = threading.Timer(0.2, service.start)
    starting.start()
    assert client.recoveries.create(**ASK).state == "queued"
    starting.join()
    assert len(service.jobs) == 1


def test_a_server_that_is_not_there_is_named_without_its_password():
    unreachable = pytest.raises(recoup.APIConnectionError, match=r"Cannot reach http://127\.0\.0\.1:1")
    with Client("http://user:hunter2@127.0.0.1:1", max_retries=0) as client, unreachable as caught:
        client.capabilities()
    assert "hunter2" not in str(caught.value)


def test_silence_is_a_timeout(service):
    timeout = pytest.raises(recoup.APITimeoutError, match="in time")
    with Client(service.url, timeout=0.2, max_retries=0) as client, service.silence(), timeout:
        client.capabilities()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b""])
def test_a_server_of_another_kind_is_recognised(client, service, faults, body):
    service.faults.append(faults(200, body=body))
    with pytest.raises(recoup.InvalidAnswerError, match="Is it a Recoup server"):
        client.capabilities()


def test_a_gateways_page_is_an_internal_server_error(service, faults):
    service.faults.append(faults(502))
    with Client(service.url, max_retries=0) as client, pytest.raises(recoup.InternalServerError) as caught:
        client.capabilities()
    assert (caught.value.code, caught.value.request_id) == ("http_502", "req_1")
