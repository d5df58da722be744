"""Faults drawn by a seed, on several jobs and two workers; the ledger must show none of them.

    RECOUP_CHAOS_SEED=17 pytest tests/chaos/test_seeds.py -k another

repeats the draws of one seed, with the light science and with the real one. What must hold in the end stands
in `conftest.violations_in`, which every test of this folder is checked against.
"""

import contextlib
import os
import resource
import signal
import time

import psutil
import pytest
from sqlalchemy import text

from recoup_jobs.artifacts import open_published
from recoup_jobs.stores import open_store

FAULTS, WORKERS = 5, 2
SLOW_SEEDS, REAL_SEEDS = range(2, 52), range(100, 105)
MOST_COMMITS = 60
"""A runner of a real recovery makes some more."""
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def chaos(installation, rng):
    for _ in range(WORKERS):
        installation.start_worker()
    return Chaos(installation, rng)


class Chaos:
    """Draws a fault, and inflicts it."""

    def __init__(self, installation, rng):
        self.installation, self.rng = installation, rng
        self.faults = [
            getattr(self, name)
            for name in sorted(vars(Chaos))
            if name.startswith(("kill_", "lose_", "send_"))
        ]

    def run(self):
        science = self.installation.science
        for _ in range(science.jobs):
            self.installation.submit(priority=self.rng.randrange(3))
        self._wait_for_work()
        for fault in self._drawn():
            time.sleep(self.rng.uniform(0.1, science.pause_seconds))
            fault()
        self.installation.wait_for_end()
        return [self.installation.state(id) for id in self.installation.jobs]

    def _drawn(self):
        return self.rng.sample(self.faults, FAULTS)

    def _wait_for_work(self):
        deadline = time.monotonic() + 30
        while not self.installation.runners() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _worker(self):
        alive = [worker for worker in self.installation.workers if worker.poll() is None]
        return self.rng.choice(alive)

    def _runner(self):
        """One of those that run, if any does; it may end at any time."""
        runners = self.installation.runners()
        return self.rng.sample(runners, min(1, len(runners)))

    def kill_worker(self):
        self._worker().kill()
        self.installation.start_worker()

    def kill_runner(self):
        send(self._runner(), signal.SIGKILL)

    def kill_broker(self):
        self._restart(forget=False)

    def lose_broker(self):
        self._restart(forget=True)

    def _restart(self, forget):
        self.installation.broker.kill(forget)
        time.sleep(self.rng.uniform(0.2, 2.0))
        self.installation.submit()
        self.installation.broker.start()

    def send_worker_sigterm(self):
        self._worker().terminate()
        self.installation.start_worker()

    def send_runner_sigterm(self):
        send(self._runner(), signal.SIGTERM)

    def send_worker_to_sleep(self):
        """Past its lease, while its runner works on."""
        self._freeze([self._worker()])

    def send_runner_to_sleep(self):
        """While its supervisor renews the lease."""
        self._freeze(self._runner())

    def send_both_to_sleep(self):
        worker = self._worker()
        self._freeze([worker, *psutil.Process(worker.pid).children()])

    def _freeze(self, processes):
        send(processes, signal.SIGSTOP)
        time.sleep(self.installation.settings.lease_seconds + self.rng.uniform(0.5, 1.5))
        send(processes, signal.SIGCONT)

    def send_hints_again(self):
        """Ten times each, for jobs that have ended too."""
        for id in self.installation.jobs * 10:
            self.installation.publish(id, self.installation.settings.queue)

    def lose_disk(self):
        """From now on the runner can write to no file, the ledger's included."""
        for runner in self._runner():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(runner.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def lose_database(self):
        """PostgreSQL cuts every connection; SQLite is locked for longer than a lease."""
        engine = self.installation.ledger.engine
        if engine.dialect.name == "postgresql":
            with engine.begin() as conn:
                conn.execute(text(CUT_OTHERS))
        else:
            with engine.begin():
                time.sleep(self.installation.settings.lease_seconds + 0.5)


CUT_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()
"""


def send(processes, number):
    for process in processes:
        try:
            process.send_signal(number)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


@pytest.mark.parametrize(
    ("rng", "database"),
    [pytest.param(0, "sqlite", marks=pytest.mark.slow), (1, "postgresql")],  # half a minute each
    indirect=True,
    ids=["0", "1"],
)
def test_no_fault_of_two_seeds_shows_in_the_ledger(chaos):
    assert set(chaos.run()) == {"succeeded"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rng", "database"),
    [(seed, ("sqlite", "postgresql")[seed % 2]) for seed in SLOW_SEEDS],
    indirect=True,
    ids=[*map(str, SLOW_SEEDS)],
)
def test_no_fault_of_fifty_seeds_shows_in_the_ledger(chaos):
    assert set(chaos.run()) == {"succeeded"}


REAL = pytest.mark.parametrize("science", ["real"], indirect=True)


@pytest.fixture
def real_chaos(chaos, tmp_path):
    """With a third worker, a runner of which dies at one of its commits."""
    when, number = chaos.rng.choice(["before", "after"]), chaos.rng.randrange(1, MOST_COMMITS)
    chaos.installation.start_worker(RECOUP_CRASH_AT=f"runner:{when}:{number}:{tmp_path / 'crashed'}")
    return chaos


@REAL
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("rng", "database"),
    [(seed, ("sqlite", "postgresql")[seed % 2]) for seed in REAL_SEEDS],
    indirect=True,
    ids=[*map(str, REAL_SEEDS)],
)
def test_no_fault_of_five_seeds_shows_in_a_real_recovery(real_chaos, published):
    assert set(real_chaos.run()) == {"succeeded"}
    assert_published_alike(published())


@REAL
@pytest.mark.timeout(1500)
@pytest.mark.skipif("RECOUP_CHAOS_SEED" not in os.environ, reason="RECOUP_CHAOS_SEED names no seed")
def test_no_fault_of_another_seed_shows_in_a_real_recovery(real_chaos, published):
    assert set(real_chaos.run()) == {"succeeded"}
    assert_published_alike(published())


@pytest.fixture
def published(installation):
    """What each job published, by path, as sha256."""

    def of(id):
        store, place = open_store(installation.settings), installation.ledger.committed(id)["package"]
        return {file.path: file.sha256 for file in open_published(store, place).artifacts}

    return lambda: [of(id) for id in installation.jobs]


def assert_published_alike(found):
    """Whatever happened to it, a job ends in the files of one to which nothing happened."""
    assert {"report.json", "report.html", "alignment.json", "rewrites.jsonl", WEIGHTS} <= set(found[0])
    assert [set(files) for files in found] == [set(found[0])] * len(found)
    for path in (WEIGHTS, "rewrites.jsonl", "alignment.csv"):
        assert len({files[path] for files in found}) == 1, path


@pytest.mark.skipif("RECOUP_CHAOS_SEED" not in os.environ, reason="RECOUP_CHAOS_SEED names no seed")
@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_no_fault_of_another_seed_shows_in_the_ledger(chaos):
    assert set(chaos.run()) == {"succeeded"}
