"""One trace from a client's POST over the outbox, the worker and the runner to vLLM.

The ids travel as W3C `traceparent`, https://www.w3.org/TR/trace-context/: in a request's header, in the
column `jobs.traceparent`, in a runner's environment, in the headers of what is asked of vLLM. A job that
is taken up again days later is still part of the trace of the request that made it.

OpenTelemetry's API is always here and does nothing by itself. Spans are recorded and sent where the extra
`tracing` is installed and `OTEL_EXPORTER_OTLP_ENDPOINT` is set; without, the ids still go their way and
stand in the logs.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT = "TRACEPARENT"
"""The variable from which a runner reads its parent."""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

_W3C = TraceContextTextMapPropagator()
_NOTHING = context.Context()
_TRACER = trace.get_tracer("recoup")
"""Stands for the real one, once `start` has set that."""


def start(service: str) -> Callable[[], None]:
    """Lets this process send its spans, if an endpoint is set; call the result before an abrupt end.

    Raises:
        SystemExit: an endpoint is set, and the extra `tracing` is not installed.
    """
    if not os.environ.get(ENDPOINT):
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SystemExit(f"{ENDPOINT} is set, which needs the extra `tracing`: {error}") from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


@contextmanager
def span(name: str, parent: str | None, **attributes: str | int) -> Iterator[None]:
    """A piece of work in the trace of `parent`, a `traceparent`, or in one of its own; logs carry its id."""
    above = _W3C.extract({"traceparent": parent}, _NOTHING) if parent else _NOTHING
    made = _TRACER.start_span(name, above, attributes=attributes)
    if not made.get_span_context().is_valid:  # nobody sent ids, and nobody here makes any
        made = NonRecordingSpan(_new_context())
    with trace.use_span(made, end_on_exit=True):
        trace_id = trace.format_trace_id(made.get_span_context().trace_id)
        with structlog.contextvars.bound_contextvars(trace_id=trace_id):
            yield


def traceparent() -> str | None:
    """Of the work that goes on now, for whoever goes on with it elsewhere."""
    return headers().get("traceparent")


def headers() -> Mapping[str, str]:
    """What a request to another service says of the trace that it belongs to."""
    carried: dict[str, str] = {}
    _W3C.inject(carried)
    return carried


def _new_context() -> SpanContext:
    trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.DEFAULT))
