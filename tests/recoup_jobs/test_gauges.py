import pytest
from prometheus_client.parser import text_string_to_metric_families

from recoup_jobs.claims import Claim
from recoup_jobs.errors import StaleClaim
from recoup_jobs.gauges import exposition
from recoup_jobs.tables import events, jobs

BOTH = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def seen(ledger):
    """`seen(name, **labels)`: what a scrape shows."""

    def value(name, **labels):
        families = text_string_to_metric_families(exposition(ledger).decode())
        samples = [sample for family in families for sample in family.samples]
        return next((s.value for s in samples if s.name == name and s.labels == labels), None)

    return value


def wait(ledger, job, seconds):
    with ledger.engine.begin() as conn:
        conn.execute(events.update().where(events.c.job_id == job.id).values(at=events.c.at - seconds))


@BOTH
def test_an_empty_ledger_shows_zeros_where_alerts_look(seen):
    assert seen("recoup_queue_depth", queue="gpu.cpu") == 0
    assert seen("recoup_oldest_queued_seconds", queue="gpu.1x80g") == 0
    assert seen("recoup_outbox_lag_seconds") == 0
    assert seen("recoup_abandoned_jobs") == 0


@BOTH
def test_jobs_that_wait_are_counted_by_queue_with_the_age_of_the_oldest(ledger, asked, seen):
    first = ledger.create(asked, "gpu.cpu")
    ledger.create(asked, "gpu.cpu", kind="diagnosis")
    ledger.create(asked, "gpu.9x9g")
    wait(ledger, first, 500)
    assert seen("recoup_queue_depth", queue="gpu.cpu") == 2
    assert seen("recoup_queue_depth", queue="gpu.9x9g") == 1
    assert seen("recoup_oldest_queued_seconds", queue="gpu.cpu") == pytest.approx(500, abs=30)
    assert seen("recoup_jobs", kind="recovery", state="queued") == 2
    assert seen("recoup_jobs", kind="diagnosis", state="queued") == 1


@BOTH
def test_the_outbox_lags_until_the_hint_is_out(ledger, asked, seen):
    job = ledger.create(asked, "gpu.cpu")
    wait(ledger, job, 500)
    assert seen("recoup_outbox_lag_seconds") == pytest.approx(500, abs=30)
    ledger.mark_published(job.id)
    assert seen("recoup_outbox_lag_seconds") == 0


@BOTH
def test_a_job_that_ended_is_no_longer_live_and_counts_for_a_day(ledger, asked, seen):
    job = ledger.create(asked, "gpu.cpu")
    ledger.succeed(ledger.claim("worker", ["gpu.cpu"], 30), "partial")
    ended = {"kind": "recovery", "state": "succeeded", "outcome": "partial"}
    assert seen("recoup_jobs_ended_last_day", **ended) == 1
    assert seen("recoup_jobs", kind="recovery", state="queued") is None
    with ledger.engine.begin() as conn:
        conn.execute(jobs.update().where(jobs.c.id == job.id).values(finished_at=jobs.c.finished_at - 90_000))
    assert seen("recoup_jobs_ended_last_day", **ended) is None


def test_a_worker_that_vanished_and_its_late_write_are_counted(ledger, asked, seen):
    losses = seen("recoup_lease_losses_total", reason="lease_expired") or 0
    refused = seen("recoup_refused_writes_total")
    job = ledger.create(asked, "gpu.cpu")
    claim = ledger.claim("worker", ["gpu.cpu"], 0.001)
    assert isinstance(claim, Claim)
    while ledger.get(job.id).state == "running":
        ledger.take_back()
    with pytest.raises(StaleClaim):
        ledger.succeed(claim, "recovered")
    assert seen("recoup_lease_losses_total", reason="lease_expired") == losses + 1
    assert seen("recoup_refused_writes_total") == refused + 1
