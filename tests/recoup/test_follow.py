"""Following a job to its end, through whatever happens to the server meanwhile."""

import threading
import time

import pytest

import recoup


@pytest.fixture
def job(client, service):
    return client.recoveries.create(student="damaged", teacher="healthy")


def test_events_come_once_each_and_end_with_the_job(client, service, job):
    events = [*client.recoveries.events(job.id)]
    assert [event.seq for event in events] == [*range(1, len(service.events[job.id]) + 1)]
    assert events[-1].data == {"state": "succeeded"}


def test_events_start_after_the_event_last_seen(client, job):
    assert next(client.recoveries.events(job.id, after=2)).seq == 3


def test_history_is_the_events_so_far(client, job):
    assert [event.data for event in client.recoveries.history(job.id)] == [{"state": "queued"}]
    client.recoveries.wait(job.id)
    assert [event.seq for event in client.recoveries.history(job.id, after=5)] == [6, 7, 8, 9]


@pytest.mark.parametrize("tears", [[0], [2, 0, 1], [3, 1]])
def test_a_torn_stream_is_taken_up_after_the_last_whole_event(client, service, job, tears):
    service.tears += tears
    seen = [event.seq for event in client.recoveries.events(job.id)]
    assert seen == [*range(1, len(service.events[job.id]) + 1)]
    streams = service.sent("GET", f"/v1/recoveries/{job.id}/events")
    assert len(streams) == 1 + len(tears)
    starts = [int(request.headers.get("Last-Event-ID", 0)) for request in streams]
    assert starts == [sum(tears[:count]) for count in range(len(streams))]


def test_an_answer_that_is_no_stream_is_told(client, service, job, faults):
    service.faults.append(faults(200, {"Content-Type": "text/html"}))
    with pytest.raises(recoup.InvalidAnswerError, match="no stream"):
        next(client.recoveries.events(job.id))


def test_a_stream_that_nobody_reads_on_is_closed(client, endless, job):
    following = client.recoveries.events(job.id)
    next(following)
    following.close()
    assert client.capabilities().version == "0.1.0"


def test_events_survive_a_restart_of_the_server(client, service, job):
    seen = []
    for event in client.recoveries.events(job.id):
        seen.append(event.seq)
        if event.seq == 3:
            service.stop()
            restart = threading.Timer(1.0, service.start)
            restart.start()
    restart.join()
    assert seen == [*range(1, len(service.events[job.id]) + 1)]


def test_events_survive_a_gateway_that_has_lost_its_server(client, service, job, faults):
    service.tears.append(1)
    following = client.recoveries.events(job.id)
    next(following)
    service.faults += [faults(502, {"Retry-After": "0"})] * 4
    assert [*following][-1].data == {"state": "succeeded"}


def test_events_do_not_wait_for_a_server_that_never_was(connect):
    with connect("http://127.0.0.1:1", max_retries=0) as client, pytest.raises(recoup.APIConnectionError):
        next(client.recoveries.events("rec_1"))


def test_a_refusal_ends_following_at_once(client, service, job):
    service.tears.append(1)
    following = client.recoveries.events(job.id)
    next(following)
    service.jobs.clear()
    with pytest.raises(recoup.NotFoundError):
        next(following)


def test_wait_tells_of_progress_at_each_change_and_of_each_event(client, service, job):
    progress, events = [], []
    done = client.recoveries.wait(job.id, on_progress=progress.append, on_event=events.append)
    assert (done.state, done.outcome) == ("succeeded", "recovered")
    assert [(step.stage, step.done) for step in progress] == [("generate", 3), ("distil", 12)]
    assert [event.seq for event in events] == [*range(1, len(service.events[job.id]) + 1)]


def test_a_failed_job_is_an_error_that_carries_the_job(client, failing):
    job = client.recoveries.create(student="damaged", teacher="healthy")
    with pytest.raises(recoup.JobFailedError, match="too little memory") as caught:
        client.recoveries.wait(job.id)
    assert caught.value.recovery.id == job.id


def test_a_poll_that_is_held_for_longer_than_the_timeout_is_no_outage(connect, service, faults):
    with connect(service.url, timeout=0.2, max_retries=0) as client:
        job = client.recoveries.create(student="damaged", teacher="healthy")
        service.faults += [None, faults(304, body=b"", delay=0.5)]
        client.recoveries.wait(job.id)
    polls = [request for request in service.seen if "wait" in request.query]
    assert len(polls) == 1 + len(service.script)


def test_a_wait_that_is_over_leaves_the_job_alone(client, endless, job):
    started = time.monotonic()
    with pytest.raises(recoup.WaitTimeoutError, match="goes on") as caught:
        client.recoveries.wait(job.id, timeout=0.5)
    assert time.monotonic() - started < 3
    assert caught.value.recovery.state in {"queued", "running"}
    assert not endless.sent("POST", f"/v1/recoveries/{job.id}/cancel")
