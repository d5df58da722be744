"""A worker for one job, as KEDA starts it: the real command, the ledger, and no broker."""

import os
import subprocess
import sys

import pytest

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path, log_format="json")


@pytest.fixture
def once(settings):
    """Starts the worker and waits for its end; answers what it logged."""

    def work():
        done = subprocess.run(
            [sys.executable, "-m", "recoup_server", "worker", "--once"],
            env=os.environ | settings.environment(),
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return work


def test_where_nothing_waits_it_ends_at_once(once):
    assert "claimed" not in once()


def test_it_takes_one_job_and_ends_with_it(settings, once):
    ledger = open_ledger(settings)
    asked = CreateRecovery(student=ModelRef(source="nowhere"), teacher=ModelRef(source="nowhere"))
    first, second = (ledger.create(asked, settings.queue) for _ in range(2))
    logged = once()
    assert ledger.get(first.id).state == "failed"
    assert ledger.get(second.id).state == "queued"
    assert f'"job_id": "{first.id}"' in logged
    ledger.close()
