import asyncio
import json
import threading
import time

import httpx2
import pytest

from recoup_api.app import create_app
from recoup_api.watch import Watch

SSE = {"accept": "text/event-stream"}


@pytest.fixture
def url(serve, settings, ledger):
    return serve(create_app(settings, ledger))


def listen(url, id, **headers):
    """(id, type, data) of each event of a stream, to its end."""
    where = f"{url}/v1/recoveries/{id}/events"
    with httpx2.stream("GET", where, headers=SSE | headers, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif event:
                yield event.get("id"), event["event"], json.loads(event["data"])
                event = {}


def test_a_stream_tells_all_that_was_and_will_be_and_ends_with_the_job(url, ledger, claim):
    def work():
        for step in range(20):
            ledger.event(claim, "metric", {"step": step})
        ledger.succeed(claim, "recovered")

    later = threading.Timer(0.6, work)
    later.start()
    *told, end = listen(url, claim.job_id)
    later.join()
    assert [id for id, _, _ in told] == [str(seq) for seq in range(1, 24)]
    assert [data["seq"] for _, _, data in told] == list(range(1, 24))
    assert (told[0][1], told[2][1], told[-1][2]["data"]["state"]) == ("state", "metric", "succeeded")
    assert end == (None, "end", {})


def test_a_stream_goes_on_behind_the_last_event_that_arrived(url, ledger, claim):
    for step in range(5):
        ledger.event(claim, "metric", {"step": step})
    ledger.succeed(claim, "recovered")
    assert [id for id, _, _ in listen(url, claim.job_id, **{"last-event-id": "5"})] == ["6", "7", "8", None]


def test_more_events_than_a_feed_holds_all_arrive(url, ledger, claim):
    def work():
        for step in range(1200):
            ledger.event(claim, "metric", {"step": step})
        ledger.succeed(claim, "recovered")

    worker = threading.Thread(target=work)
    worker.start()
    ids = [id for id, _, _ in listen(url, claim.job_id)]
    worker.join()
    assert ids == [*(str(seq) for seq in range(1, 1204)), None]


@pytest.mark.parametrize("id", ["text", "-1", "1.0", "9" * 19])
def test_an_event_id_that_is_none_is_refused(client, claim, id):
    url = f"/v1/recoveries/{claim.job_id}/events"
    refused = client.get(url, headers=SSE | {"last-event-id": id})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_event_id")


def test_a_stream_from_a_future_event_waits_for_the_end(url, ledger, claim):
    later = threading.Timer(0.6, lambda: ledger.succeed(claim, "recovered"))
    later.start()
    began = time.monotonic()
    assert [type for _, type, _ in listen(url, claim.job_id, **{"last-event-id": "999999999999"})] == ["end"]
    later.join()
    assert time.monotonic() - began > 0.5


class CountedLedger:
    """A ledger that notes when it was looked at, and how often its events were read."""

    def __init__(self, ledger):
        self._ledger = ledger
        self.looks, self.reads = [], 0

    def reading(self):
        self.looks.append(time.monotonic())
        return self._ledger.reading()

    def events(self, *what):
        self.reads += 1
        return self._ledger.events(*what)


def test_a_thousand_watchers_cost_one_look_a_tick(ledger, claim):
    counted = CountedLedger(ledger)

    async def watch():
        streams = [watching.stream(claim.job_id, 2) for _ in range(1000)]
        waiting = [asyncio.create_task(anext(stream)) for stream in streams]
        while counted.reads < 1000:
            await asyncio.sleep(0.1)
        counted.looks.clear()
        before = time.process_time()
        await asyncio.sleep(2.0)
        spent, looks = time.process_time() - before, len(counted.looks)
        ledger.event(claim, "metric", {"step": 1})
        told = await asyncio.gather(*waiting)
        for stream in streams:
            await stream.aclose()
        return spent, looks, told

    watching = Watch(counted)
    spent, looks, told = asyncio.run(watch())
    assert len(set(told)) == 1
    assert b"id: 3\n" in told[0]
    assert looks <= 9
    assert counted.reads == 1001
    assert spent < 0.2


def test_an_unchanged_job_answers_a_long_poll_only_in_the_end(client, job):
    began = time.monotonic()
    client.get(f"/v1/recoveries/{job['id']}", params={"wait": 1})
    assert 0.9 < time.monotonic() - began < 5
