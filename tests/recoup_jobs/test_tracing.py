import json
import re
import subprocess
import sys

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
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SystemExit, match="tracing"):
        tracing.start("recoup-test")


ONE_TRACE = """
import json, sys
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs import tracing
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings

kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
ledger = open_ledger(Settings(home=Path(sys.argv[1])))
with tracing.span("request", None):
    job = ledger.create(CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t")), "gpu.cpu")
with tracing.span("publish", ledger.traceparent(job.id)):
    pass
claim = ledger.claim("worker", ["gpu.cpu"], 30)
with tracing.span("work", claim.traceparent, job_id=job.id):
    handed_over = tracing.traceparent()
with tracing.span("run", handed_over):
    asked = tracing.headers()["traceparent"]
spans = {each.name: each for each in kept.get_finished_spans()}
parents = {name: each.parent and each.parent.span_id for name, each in spans.items()}
ids = {each.context.span_id: name for name, each in spans.items()}
print(json.dumps({
    "traces": len({each.context.trace_id for each in spans.values()}),
    "parents": {name: ids.get(parent) for name, parent in parents.items()},
    "asked": int(asked.split("-")[2], 16) == spans["run"].context.span_id,
}))
"""


def test_one_trace_goes_from_the_request_to_what_is_asked_of_vllm(tmp_path):
    """In a process of its own: OpenTelemetry's provider is set once in a process."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_TRACE, tmp_path], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "traces": 1,
        "parents": {"request": None, "publish": "request", "work": "request", "run": "work"},
        "asked": True,
    }
