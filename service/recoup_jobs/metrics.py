"""Every metric of an installation, named here and nowhere else.

Two kinds, by where the truth is. What the ledger knows (how many wait, for how long) is read from it when
somebody asks (`gauges.py`), so all API processes answer alike and a restart forgets nothing. What happens
in a process (requests, leases that are lost, stages that end) is counted in that process.

A runner has no port of its own: it ends with its job. Its supervisor reads the job's events as the runner
writes them (`recoup_worker.meter`), so that what was committed is counted even if the runner was killed.

Labels take values from fixed lists (states, stages, classes of machine, route templates), never from what
a client sends; tenants, jobs and models are for logs and the ledger.
"""

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGE_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 48 * 3600)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
FRACTION_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

REGISTRY = CollectorRegistry()
"""What this process counts."""

HTTP_REQUESTS = Counter(
    "recoup_http_requests",
    "Answers of the API, by the template of the route.",
    ["method", "route", "status"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "recoup_http_request_seconds",
    "From the first byte of a request to the head of its answer.",
    ["method", "route"],
    buckets=REQUEST_BUCKETS,
    registry=REGISTRY,
)
LEASE_LOSSES = Counter(
    "recoup_lease_losses",
    "Jobs that were given back because their worker or runner vanished, by why.",
    ["reason"],
    registry=REGISTRY,
)
REFUSED_WRITES = Counter(
    "recoup_refused_writes",
    "Writes of workers that no longer held their job.",
    registry=REGISTRY,
)
HINTS = Counter("recoup_hints_published", "Hints that were sent to workers.", registry=REGISTRY)
CLAIM_SECONDS = Histogram(
    "recoup_claim_latency_seconds",
    "From a job's creation to its first claim.",
    buckets=STAGE_BUCKETS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "recoup_stage_seconds",
    "From a stage's start to its commit.",
    ["stage"],
    buckets=STAGE_BUCKETS,
    registry=REGISTRY,
)
TOKENS_GENERATED = Counter(
    "recoup_tokens_generated",
    "Tokens of answers, made or found in the cache, counted when stage generate ends.",
    registry=REGISTRY,
)
TOKENS_TRAINED = Counter(
    "recoup_tokens_trained",
    "Tokens that entered a loss, repeats counted, when stage distil ends.",
    registry=REGISTRY,
)
GPU_SECONDS = Counter(
    "recoup_gpu_seconds",
    "GPUs of the worker's class of machine times the seconds for which it held a job.",
    ["queue"],
    registry=REGISTRY,
)
JOBS_ENDED = Counter(
    "recoup_jobs_ended",
    "Jobs that ended in this worker's hands.",
    ["kind", "state", "outcome"],
    registry=REGISTRY,
)
RECOVERED_FRACTION = Histogram(
    "recoup_recovered_fraction",
    "Share of the divergence that was lost and won back, of each recovery that trained.",
    buckets=FRACTION_BUCKETS,
    registry=REGISTRY,
)


@dataclass(frozen=True)
class Gauges:
    """What the ledger knows at one moment."""

    live: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_jobs", "Jobs that have not ended.", labels=["kind", "state"]
        )
    )
    ended: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_jobs_ended_last_day",
            "Jobs that ended in the last 24 hours.",
            labels=["kind", "state", "outcome"],
        )
    )
    depth: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_queue_depth", "Jobs that wait for a worker.", labels=["queue"]
        )
    )
    oldest: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_oldest_queued_seconds", "For how long the oldest of them waits.", labels=["queue"]
        )
    )
    outbox_lag: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_outbox_lag_seconds", "For how long the oldest job waits of which nobody was told."
        )
    )
    abandoned: GaugeMetricFamily = field(
        default_factory=lambda: GaugeMetricFamily(
            "recoup_abandoned_jobs", "Jobs whose lease has run out and that nobody took back yet."
        )
    )
