import logging
import threading
import time

import pytest
from kombu.exceptions import OperationalError

from recoup_jobs.sweeper import Sweeper


class Broker:
    """Remembers what was published; can be away."""

    def __init__(self):
        self.away = False
        self.hints = []
        self.tried = threading.Event()

    def publish(self, job_id, queue):
        self.tried.set()
        if self.away:
            raise OperationalError("connection refused")
        self.hints.append((job_id, queue))


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def sweeper(ledger, settings, broker):
    sweeper = Sweeper(ledger, broker.publish, settings)
    sweeper.start()
    yield sweeper
    sweeper.stop()


def wait_until(true, seconds=5):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_new_job_is_published_once(ledger, asked, broker, sweeper):
    job = ledger.create(asked, "gpu.cpu")
    wait_until(lambda: ledger.due(60) == [])
    time.sleep(0.1)
    assert broker.hints == [(job.id, "gpu.cpu")]


def test_a_broker_that_is_away_costs_time_but_no_job(ledger, asked, broker, sweeper, caplog):
    broker.away = True
    job = ledger.create(asked, "gpu.cpu")
    assert broker.tried.wait(5)
    wait_until(lambda: "tries again" in caplog.text)
    assert broker.hints == []
    broker.away = False
    wait_until(lambda: ledger.due(60) == [])
    assert broker.hints == [(job.id, "gpu.cpu")]


def test_a_database_that_is_away_does_not_end_the_sweeper(ledger, asked, broker, sweeper, caplog):
    with caplog.at_level(logging.WARNING), ledger.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE jobs RENAME TO hidden")
    wait_until(lambda: "no such table" in caplog.text)
    with ledger.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE hidden RENAME TO jobs")
    job = ledger.create(asked, "gpu.cpu")
    wait_until(lambda: broker.hints)
    assert sweeper.alive and broker.hints == [(job.id, "gpu.cpu")]


def test_a_stopped_sweeper_is_not_alive(sweeper):
    assert sweeper.alive
    sweeper.stop()
    assert not sweeper.alive


def test_one_sweeper_leads_and_another_takes_over_at_once_when_it_stops(
    ledger, asked, broker, settings, sweeper
):
    second = Sweeper(ledger, broker.publish, settings)
    job = ledger.create(asked, "gpu.cpu")
    wait_until(lambda: broker.hints == [(job.id, "gpu.cpu")])
    second.start()
    assert not ledger.lead("sweeper", "third", 30)
    sweeper.stop()
    later = ledger.create(asked, "gpu.cpu")
    wait_until(lambda: broker.hints[1:] == [(later.id, "gpu.cpu")])
    second.stop()


def test_a_leader_that_vanished_is_followed_when_its_lease_has_run_out(ledger):
    assert ledger.lead("sweeper", "first", 30)
    assert not ledger.lead("sweeper", "second", 30)
    assert ledger.lead("sweeper", "first", -1)
    assert ledger.lead("sweeper", "second", 30)


def test_a_job_whose_worker_vanished_is_given_back_and_published(ledger, asked, broker, sweeper):
    job = ledger.create(asked, "gpu.cpu")
    ledger.claim("doomed", ["gpu.cpu"], -1)
    wait_until(lambda: ledger.get(job.id).state == "queued" and (job.id, "gpu.cpu") in broker.hints)
    assert ledger.get(job.id).losses == 1


def test_a_cancelled_job_ends_although_no_worker_is_left(ledger, asked, broker, sweeper):
    claim = ledger.claim("doomed", ["gpu.cpu"], 30, only=ledger.create(asked, "gpu.cpu").id)
    ledger.cancel(claim.job_id)
    ledger.renew(claim, -1)
    wait_until(lambda: ledger.get(claim.job_id).state != "cancelling")
    assert ledger.get(claim.job_id).state == "cancelled"
