import re

import pytest
import structlog

from recoup_jobs import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_work_belongs_to_the_trace_that_it_is_given():
    with tracing.span("work", PARENT):
        assert tracing.traceparent().split("-")[1] == PARENT.split("-")[1]
        assert structlog.contextvars.get_contextvars()["trace_id"] == PARENT.split("-")[1]
    assert tracing.traceparent() is None


@pytest.mark.parametrize("parent", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_work_without_a_trace_begins_one(parent):
    with tracing.span("work", parent):
        begun = tracing.traceparent()
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", begun)
    assert set(begun.split("-")[1]) != {"0"}


def test_a_job_keeps_the_trace_of_the_request_that_made_it(ledger, asked):
    with tracing.span("request", PARENT):
        job = ledger.create(asked, "gpu.cpu")
    other = ledger.create(asked, "gpu.cpu")
    assert ledger.traceparent(job.id).split("-")[1] == PARENT.split("-")[1]
    assert ledger.traceparent(other.id) is None
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    assert claim.traceparent == ledger.traceparent(job.id)


def test_an_endpoint_without_the_extra_is_said_and_not_ignored(monkeypatch):
    monkeypatch.setenv(tracing.ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setitem(
        __import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None
    )
    with pytest.raises(SystemExit, match="tracing"):
        tracing.start("recoup-test")
