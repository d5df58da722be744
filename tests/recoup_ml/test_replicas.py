"""Several servers, which refuse, err, are slow, die and come back: every row is there, once."""

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from recoup_ml.errors import TeacherUnavailable
from recoup_ml.vllm_engine import Generator, Patience, Question, Row, Sampling

PATIENT = Patience(answer=5.0, tries=4, outage=5.0)
QUESTIONS = [Question(place, (9, place)) for place in range(120)]


def rows_of(servers: list[Any], patience: Patience = PATIENT) -> list[Row]:
    async def collect() -> list[Row]:
        generator = Generator([server.url for server in servers], patience)
        return [row async for row in generator.rows(QUESTIONS, Sampling(4))]

    return asyncio.run(collect())


def assert_every_row_once(rows: list[Row]) -> None:
    assert sorted(row.place for row in rows) == [question.place for question in QUESTIONS]
    assert all(row.ids == (9, row.place, 2) for row in rows)


def slowly(seconds: float) -> Any:
    def reply(answer: Any) -> Any:
        time.sleep(seconds)
        return answer

    return reply


def test_what_is_asked_belongs_to_the_trace_of_the_recovery(replicas: list[Any]) -> None:
    ids = SpanContext(0xAB, 0xCD, is_remote=True, trace_flags=TraceFlags(1))
    with use_span(NonRecordingSpan(ids)):
        assert_every_row_once(rows_of(replicas))
    assert {trace for replica in replicas for trace in replica.traces} == {f"00-{0xAB:032x}-{0xCD:016x}-01"}


def test_two_replicas_share_the_work(replicas: list[Any]) -> None:
    for replica in replicas:
        replica.reply = slowly(0.01)
    assert_every_row_once(rows_of(replicas))
    assert min(len(replica.bodies) for replica in replicas) > 30


def test_the_faster_replica_answers_more(replicas: list[Any]) -> None:
    slow, fast = replicas
    slow.reply, fast.reply = slowly(0.3), slowly(0.01)
    assert_every_row_once(rows_of(replicas))
    assert len(fast.bodies) > 1.5 * len(slow.bodies)


def test_a_replica_that_dies_in_the_middle_costs_no_row(replicas: list[Any]) -> None:
    dying, other = replicas
    other.reply = slowly(0.02)

    def die(answer: Any) -> Any:
        if len(dying.bodies) == 10:
            threading.Thread(target=dying.die).start()
        time.sleep(0.1)
        return answer

    dying.reply = die
    assert_every_row_once(rows_of(replicas))
    asked = Counter(tuple(body["prompt"]) for server in replicas for body in server.bodies)
    assert max(asked.values()) > 1, "nothing was in flight when it died"
    dying.live()


def test_a_replica_that_comes_back_is_asked_again(replicas: list[Any]) -> None:
    returning, other = replicas
    returning.die()
    other.reply = slowly(0.3)
    back = threading.Timer(0.1, returning.live)
    back.start()
    assert_every_row_once(rows_of(replicas))
    back.join()
    assert returning.bodies


def test_a_replica_that_is_ill_is_not_asked(replicas: list[Any], refusal: type) -> None:
    ill, other = replicas
    ill.healthy, ill.reply = False, lambda _: refusal(500)
    other.reply = slowly(0.01)
    assert_every_row_once(rows_of(replicas))
    assert len(ill.bodies) <= 16


def test_a_replica_that_errs_now_and_then_is_asked_again(server: Any, refusal: type) -> None:
    failing = iter(range(10_000))
    server.reply = lambda answer: refusal(500) if next(failing) % 20 == 3 else answer
    assert_every_row_once(rows_of([server]))


def test_a_server_that_wants_to_be_left_alone_is(server: Any, refusal: type) -> None:
    began: list[float] = []
    refused: list[float] = []

    def reply(answer: Any) -> Any:
        began.append(time.monotonic())
        if not refused:
            refused.append(began[-1])
            return refusal(429, {"Retry-After": "1"})
        return slowly(0.01)(answer)

    server.reply = reply
    assert_every_row_once(rows_of([server]))
    quiet = [moment - refused[0] for moment in began if moment - refused[0] > 0.3]
    assert min(quiet) >= 0.99


def test_refusals_narrow_the_window(server: Any, refusal: type) -> None:
    def reply(answer: Any) -> Any:
        if server.busy > 4:
            return refusal(429, {"Retry-After": "0"})
        return slowly(0.02)(answer)

    server.reply = reply
    assert_every_row_once(rows_of([server]))
    turned_away = len(server.bodies) - len(QUESTIONS)
    assert turned_away < len(QUESTIONS)


def test_nothing_but_refusals_is_an_unavailable_teacher(server: Any, refusal: type) -> None:
    server.reply = lambda _: refusal(429)
    with pytest.raises(TeacherUnavailable, match="does not answer /v1/completions: 429"):
        rows_of([server], Patience(outage=0.8))


def test_no_replica_for_too_long_is_an_unavailable_teacher(server: Any) -> None:
    def die(answer: Any) -> Any:
        threading.Thread(target=server.die).start()
        time.sleep(0.2)
        return answer

    server.reply = die
    with pytest.raises(TeacherUnavailable, match="Check RECOUP_VLLM_URLS"):
        rows_of([server], Patience(outage=0.5))
    server.live()


def test_a_replica_that_serves_another_model_is_left_out(replicas: list[Any]) -> None:
    _, other = replicas
    other.models = [{"id": "student", "max_model_len": 4096}]
    assert_every_row_once(rows_of(replicas))
    assert not other.bodies


def test_a_replica_that_comes_back_with_another_model_stays_out(replicas: list[Any]) -> None:
    changed, other = replicas
    changed.die()
    changed.models = [{"id": "student", "max_model_len": 4096}]
    changed.live()
    other.reply = slowly(0.05)
    assert_every_row_once(rows_of([other, changed]))
    assert not changed.bodies


def test_a_slow_answer_is_asked_for_again_elsewhere(replicas: list[Any]) -> None:
    stuck, other = replicas
    release = threading.Event()
    stuck.reply = lambda answer: (release.wait(10) and answer) or answer
    other.reply = slowly(0.01)
    assert_every_row_once(rows_of(replicas, Patience(answer=0.5, tries=8, outage=5.0)))
    release.set()
