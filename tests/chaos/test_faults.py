"""One fault at a time, on one job that would otherwise run for long.

Slow are those that `test_seeds.py` draws as well.
"""

import contextlib
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from recoup_jobs.settings import Settings

SLOW = {"LIGHT_STEP_SECONDS": "0.5"}


@pytest.fixture
def worker(installation):
    return installation.start_worker(**SLOW)


@pytest.fixture
def job(installation, worker):
    return installation.submit()


@pytest.fixture
def runner(installation, job):
    return installation.wait_for_runner(job)


def reasons(installation, id):
    return [event.data.get("reason") for event in installation.events(id, "state")]


@pytest.mark.slow
def test_a_killed_runner_is_followed_by_another(installation, job, runner):
    runner.kill()
    installation.wait_for_end()
    assert installation.ledger.get(job).losses == 1
    assert installation.state(job) == "succeeded"


def test_a_runner_dies_with_its_worker_and_another_worker_goes_on(installation, worker, job, runner):
    worker.kill()
    runner.wait(5)
    installation.start_worker()
    installation.wait_for_end()
    assert (installation.state(job), installation.ledger.get(job).epoch) == ("succeeded", 2)


def test_a_worker_that_is_told_to_end_gives_its_job_back(installation, worker, job, runner):
    asked = time.monotonic()
    worker.terminate()
    assert worker.wait(30) == 0
    assert time.monotonic() - asked < 30
    assert (installation.state(job), installation.ledger.get(job).losses) == ("queued", 0)
    installation.start_worker()
    installation.wait_for_end()
    assert "released" in reasons(installation, job)


def test_a_runner_that_is_alive_but_stuck_is_killed(install, settings):
    installation = install(settings.model_copy(update={"stall_seconds": 8.0}))
    installation.start_worker(**SLOW)
    job = installation.submit()
    runner = installation.wait_for_runner(job)
    runner.send_signal(signal.SIGSTOP)
    runner.wait(60)
    installation.wait_for_end()
    assert "runner_stalled" in reasons(installation, job)


def test_cancelling_frees_the_device(installation, job, runner):
    installation.ledger.cancel(job)
    runner.wait(5)
    installation.wait_for_end(seconds=5)
    assert installation.state(job) == "cancelled"


def test_pausing_frees_the_device_and_resuming_goes_on(installation, job, runner):
    installation.ledger.pause(job)
    runner.wait(5)
    deadline = time.monotonic() + 5
    while installation.state(job) != "paused":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    installation.ledger.resume(job)
    installation.wait_for_end()
    assert (installation.state(job), installation.ledger.get(job).losses) == ("succeeded", 0)


def test_what_was_accepted_while_the_broker_was_away_runs_once_it_is_back(installation, broker):
    broker.kill(forget=True)
    job = installation.submit()
    time.sleep(0.5)
    broker.start()
    installation.start_worker()
    installation.wait_for_end()
    assert installation.state(job) == "succeeded"


@pytest.mark.parametrize(
    "forget", [pytest.param(False, marks=pytest.mark.slow), True], ids=["with its file", "without"]
)  # half a minute each
def test_a_broker_that_restarts_under_a_busy_worker_loses_no_job(
    installation, broker, worker, job, runner, forget
):
    later = installation.submit()
    broker.kill(forget)
    time.sleep(1)
    broker.start()
    installation.wait_for_end()
    assert worker.poll() is None
    assert [installation.state(id) for id in (job, later)] == ["succeeded"] * 2


@pytest.mark.slow
def test_a_zombie_that_wakes_after_its_lease_is_refused(installation, worker, job, runner):
    for frozen in (worker, runner):
        frozen.send_signal(signal.SIGSTOP)
    installation.start_worker()
    deadline = time.monotonic() + 30
    while installation.ledger.get(job).epoch < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for frozen in (runner, worker):
        frozen.send_signal(signal.SIGCONT)
    runner.wait(10)
    installation.wait_for_end()
    assert (installation.state(job), installation.ledger.get(job).epoch) == ("succeeded", 2)


@pytest.mark.slow
def test_a_hint_for_what_has_ended_and_one_that_comes_ten_times_do_nothing(installation, worker, job):
    for _ in range(10):
        installation.publish(job, installation.settings.queue)
    installation.wait_for_end()
    installation.publish(job, installation.settings.queue)
    time.sleep(0.5)
    assert installation.ledger.get(job).epoch == 1


@pytest.mark.slow
def test_a_full_disk_costs_a_try_and_not_the_job(installation, job, runner):
    import resource

    resource.prlimit(runner.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    installation.wait_for_end()
    assert installation.state(job) == "succeeded"
    assert installation.ledger.get(job).failures + installation.ledger.get(job).losses >= 1


@pytest.fixture
def distant(bucket, settings):
    """The same settings with artifacts in a bucket, behind a wire that can be cut and is cut now."""
    wire = Wire(urlsplit(bucket["artifacts_endpoint"]).port)
    yield wire, settings.model_copy(update=bucket | {"artifacts_endpoint": wire.url})
    wire.cut()


class Wire:
    """A port that passes everything on to another one, while it is joined."""

    def __init__(self, to):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._to, self._listener = f"http://127.0.0.1:{self.port}", to, None

    def join(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def cut(self):
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=[source, sink], daemon=True).start()


def pump(source, sink):
    with source, contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_a_bucket_that_is_away_costs_a_try_and_not_the_job(distant, install):
    wire, settings = distant
    installation = install(settings)
    installation.start_worker()
    job = installation.submit()
    deadline = time.monotonic() + 60
    while installation.ledger.get(job).failures == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wire.join()
    installation.wait_for_end()
    assert installation.state(job) == "succeeded"
    assert "artifacts_unavailable" in str(installation.events(job, "state"))
    assert not (settings.home / "artifacts").exists()


def test_the_grace_leaves_the_device_free_within_thirty_seconds():
    assert Settings.model_fields["grace_seconds"].default + 2 < 30
