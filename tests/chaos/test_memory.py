"""A runner that ends by SIGKILL, with and without the kernel counting it among those for memory."""

import os
import sys
import threading
import time

import pytest
from sqlalchemy import select

from recoup_jobs.ledger import open_ledger
from recoup_jobs.tables import jobs
from recoup_worker import memory
from recoup_worker.supervisor import supervise


@pytest.fixture
def ledger(settings):
    ledger = open_ledger(settings)
    yield ledger
    ledger.close()


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The file in which the kernel counts."""
    counts = tmp_path / "vmstat"
    counts.write_text("nr_free_pages 7\noom_kill 4\n")
    monkeypatch.setattr(memory, "VMSTAT", counts)
    return counts


@pytest.fixture
def run_and_kill(ledger, settings, light, processes, monkeypatch):
    """Claims the job, runs it, and kills its runner; `before` happens just before."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(light), *filter(None, sys.path)]))
    monkeypatch.setenv("LIGHT_STEP_SECONDS", "5")

    def run_and_kill(before=lambda: None):
        claim = ledger.claim("worker", [settings.queue], 30)
        supervisor = threading.Thread(target=supervise, args=(claim, ledger, settings, threading.Event()))
        supervisor.start()
        deadline = time.monotonic() + 60
        while ledger.get(claim.job_id).stage is None or not processes(claim.job_id):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before()
        processes(claim.job_id)[0].kill()
        supervisor.join()
        return ledger.get(claim.job_id)

    return run_and_kill


def halvings(ledger):
    with ledger.reading() as conn:
        return conn.execute(select(jobs.c.memory_failures)).scalar_one()


def test_memory_may_run_out_once_and_the_next_claim_knows(ledger, settings, asked, kernel, run_and_kill):
    ledger.create(asked, settings.queue)
    first = run_and_kill(lambda: kernel.write_text("oom_kill 5\n"))
    assert (first.state, first.failures, first.losses, halvings(ledger)) == ("queued", 1, 0, 1)
    second = run_and_kill(lambda: kernel.write_text("oom_kill 6\n"))
    assert (second.state, second.error.code) == ("failed", "out_of_memory")


def test_a_kill_that_the_kernel_did_not_count_is_a_loss(ledger, settings, asked, kernel, run_and_kill):
    ledger.create(asked, settings.queue)
    killed = run_and_kill()
    assert (killed.state, killed.failures, killed.losses, halvings(ledger)) == ("queued", 0, 1, 0)


def test_the_kernel_that_runs_this_counts():
    if not memory.VMSTAT.exists():
        pytest.skip("no /proc/vmstat here")
    assert "oom_kill " in memory.VMSTAT.read_text()
    assert memory.oom_kills() >= 0
