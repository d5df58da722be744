"""`Client` against a live server on loopback: every endpoint, every kind of trouble."""

import threading
import time

import pytest
from pydantic import ValidationError

import recoup
from recoup import CreateRecovery

ASK = {"student": "damaged", "teacher": "healthy"}


def test_a_str_names_the_source_of_a_model(client, service):
    job = client.recoveries.create(**ASK, seed=7)
    assert (job.state, job.request.student.source, job.request.seed) == ("queued", "damaged", 7)


def test_a_ready_request_is_taken_as_it_is(client):
    request = CreateRecovery.model_validate({"student": {"source": "a"}, "teacher": {"source": "b"}})
    assert client.recoveries.create(request).request == request
    with pytest.raises(TypeError, match="not both"):
        client.recoveries.create(request, seed=1)


def test_a_dry_run_queues_nothing(client, service):
    found = client.recoveries.dry_run(**ASK, seed=7)
    assert (found.plan[0].value, found.estimate.seconds) == ("off_policy", 200.0)
    assert service.jobs == {}


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


def test_the_environment_names_server_and_key(connect, service, monkeypatch):
    service.key = "rk_secret"
    monkeypatch.setenv("RECOUP_BASE_URL", service.url + "/")
    monkeypatch.setenv("RECOUP_API_KEY", "rk_secret")
    with connect() as client:
        assert client.capabilities().version == "0.1.0"
    with (
        connect(api_key="rk_other") as client,
        pytest.raises(recoup.AuthenticationError, match="asks for a key"),
    ):
        client.capabilities()


@pytest.mark.parametrize("url", ["127.0.0.1:8321", "ftp://host", "http://", "http://[::", "nonsense"])
def test_an_address_that_is_none_is_refused(connect, url):
    with pytest.raises(recoup.InvalidArgumentError, match="address"):
        connect(url)


@pytest.mark.parametrize("key", ["a b", "a\r\nX-Evil: 1", "schlüssel"])
def test_a_key_cannot_smuggle_a_header(connect, key):
    with pytest.raises(recoup.InvalidArgumentError, match="API key"):
        connect(api_key=key)


def test_a_proxy_of_the_environment_does_not_stand_before_loopback(connect, service, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with connect(service.url) as client:
        assert client.capabilities().version == "0.1.0"


def test_a_dropped_get_is_sent_again(client, service, faults):
    service.faults += [faults(), faults()]
    assert client.capabilities().version == "0.1.0"
    assert len(service.seen) == 3


def test_tries_end(connect, service, faults):
    service.faults += [faults()] * 2
    with (
        connect(service.url, max_retries=1) as client,
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
def test_a_post_whose_answer_is_lost_makes_one_job(client, service, faults, status):
    service.faults.append(faults(status, heard=True))
    job = client.recoveries.create(**ASK)
    assert [*service.jobs] == [job.id]
    first, second = service.sent("POST", "/v1/recoveries")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"] != ""


def test_an_upload_whose_answer_is_lost_is_repeated_byte_for_byte(client, service, faults, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    service.faults.append(faults(heard=True))
    file = client.files.create(tmp_path / "prompts.jsonl")
    assert [*service.files] == [file.id]
    first, second = service.sent("POST", "/v1/files")
    assert first.body == second.body


def test_two_calls_have_two_keys_unless_the_caller_names_one(client, service):
    for key in (None, None, "mine", "mine"):
        client.recoveries.create(**ASK, idempotency_key=key)
    keys = [request.headers["Idempotency-Key"] for request in service.sent("POST", "/v1/recoveries")]
    assert len({*keys}) == 3
    assert len(service.jobs) == 3


def test_too_many_requests_are_sent_again_when_the_server_says(client, service, faults):
    service.faults += [faults(429, {"Retry-After": "1"}), faults(429, {"Retry-After": "0"})]
    started = time.monotonic()
    client.recoveries.create(**ASK)
    assert 1.0 <= time.monotonic() - started < 3.0
    assert len(service.seen) == 3


def test_a_wait_of_an_hour_is_the_callers_to_decide(client, service, faults):
    service.faults.append(faults(429, {"Retry-After": "3600"}))
    with pytest.raises(recoup.RateLimitError) as caught:
        client.capabilities()
    assert (caught.value.retry_after, len(service.seen)) == (3600.0, 1)


def test_a_lock_is_waited_for_and_a_conflict_is_not(client, service, faults):
    service.faults.append(faults(409, {"Retry-After": "0"}))
    assert client.recoveries.create(**ASK).state == "queued"
    service.faults.append(faults(409))
    with pytest.raises(recoup.ConflictError):
        client.recoveries.create(**ASK)
    assert len(service.seen) == 3


def test_a_post_that_found_nobody_is_sent_again(client, service):
    service.stop()
    starting = threading.Timer(0.2, service.start)
    starting.start()
    assert client.recoveries.create(**ASK).state == "queued"
    starting.join()
    assert len(service.jobs) == 1


def test_a_server_that_is_not_there_is_named_without_its_password(connect):
    unreachable = pytest.raises(recoup.APIConnectionError, match=r"Cannot reach http://127\.0\.0\.1:1")
    with connect("http://user:hunter2@127.0.0.1:1", max_retries=0) as client, unreachable as caught:
        client.capabilities()
    assert "hunter2" not in str(caught.value)


def test_silence_is_a_timeout(connect, service):
    timeout = pytest.raises(recoup.APITimeoutError, match="in time")
    with connect(service.url, timeout=0.2, max_retries=0) as client, service.silence(), timeout:
        client.capabilities()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b""])
def test_a_server_of_another_kind_is_recognised(client, service, faults, body):
    service.faults.append(faults(200, body=body))
    with pytest.raises(recoup.InvalidAnswerError, match="Is it a Recoup server"):
        client.capabilities()


def test_a_gateways_page_is_an_internal_server_error(connect, service, faults):
    service.faults.append(faults(502))
    with connect(service.url, max_retries=0) as client, pytest.raises(recoup.InternalServerError) as caught:
        client.capabilities()
    assert (caught.value.code, caught.value.request_id) == ("http_502", "req_1")


def test_a_job_is_paused_resumed_and_tried_again(client):
    id = client.recoveries.create(**ASK).id
    assert client.recoveries.pause(id).state == "paused"
    assert client.recoveries.resume(id).state == "queued"
    with pytest.raises(recoup.ConflictError, match="The recovery is queued"):
        client.recoveries.retry(id)
    client.recoveries.cancel(id)
    client.recoveries.wait(id)
    again = client.recoveries.retry(id)
    assert (again.state, again.retry_of) == ("queued", id)


def test_priority_and_metadata_may_change_and_what_is_not_given_stays(client, service):
    id = client.recoveries.create(**ASK, metadata={"run": "7"}).id
    assert client.recoveries.change(id, priority=5).request.priority == 5
    assert client.recoveries.change(id, metadata={}).request.metadata == {}
    assert [request.body for request in service.sent("PATCH", f"/v1/recoveries/{id}")] == [
        b'{"priority":5}',
        b'{"metadata":{}}',
    ]
    with pytest.raises(ValidationError):
        client.recoveries.change(id, priority=101)


def test_a_list_is_filtered_by_the_server_on_every_page(client, service):
    for _ in range(3):
        client.recoveries.create(**ASK)
    assert len([*client.recoveries.list(state="queued")]) == 3
    queries = [request.query for request in service.sent("GET", "/v1/recoveries")]
    assert [query["state"] for query in queries] == ["queued"] * 2


def test_a_raw_response_has_headers_and_the_value(client, service, faults):
    service.faults.append(faults(503, {"Retry-After": "0"}))
    raw = client.with_raw_response.capabilities()
    assert (raw.status, raw.headers["X-Request-Id"], raw.request_id, raw.tries) == (200, "req_1", "req_1", 2)
    assert raw.parse() == client.capabilities()
    job = client.recoveries.create(**ASK)
    page = client.with_raw_response.recoveries.list(limit=1).parse()
    assert (page.data, page.has_more) == ([job], False)


def test_options_hold_for_one_call_and_share_the_connection(client, service, faults):
    service.faults.append(faults(503, {"Retry-After": "0"}))
    with pytest.raises(recoup.InternalServerError):
        client.with_options(max_retries=0).capabilities()
    assert client.capabilities().version == "0.1.0"


def test_a_files_content_comes_back(client, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    file = client.files.create(tmp_path / "prompts.jsonl")
    assert client.files.content(file.id) == b'{"prompt": "a"}\n'
