"""A rolling upgrade with a migration in between, under load.

The release of this tree is the older one. The newer one is this tree with one more revision, of the kind that
docs/10-operations.md allows: it adds. Both versions of the worker work on one database; ledger, sweeper and
clients of this process stay with the older release all along.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from recoup_jobs.database import migrations

ROOT = Path(__file__).parents[2]
LIGHT = Path(__file__).with_name("light")
SOURCES = ("clients", "workers", "service")
REVISION = '''"""What the next release adds."""

import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("note", sa.String(64)))
    op.create_index("ix_jobs_note", "jobs", ["note"])
'''
OPEN, PACE_SECONDS = 5, 0.5


class Release:
    """A tree of sources, from which processes are started."""

    def __init__(self, tree, installation):
        self.installation = installation
        path = [str(LIGHT), *(str(tree / source) for source in SOURCES), *filter(None, sys.path)]
        self._environment = os.environ | installation.settings.environment()
        self._environment |= {
            "RECOUP_BROKER_URL": installation.broker.url,
            "PYTHONPATH": os.pathsep.join(path),
        }

    def migrate(self):
        self._start("migrate", stdout=subprocess.PIPE, stderr=subprocess.STDOUT).communicate(timeout=120)

    def start_worker(self):
        with (self.installation.settings.home / "worker.log").open("ab") as log:
            worker = self._start("worker", stdout=log, stderr=log, start_new_session=True)
        self.installation.workers.append(worker)
        return worker

    def _start(self, command, **how):
        return subprocess.Popen(
            [sys.executable, "-m", "recoup_server", command], env=self._environment, **how
        )


@pytest.fixture
def older(installation):
    return Release(ROOT, installation)


@pytest.fixture
def newer(installation, tmp_path):
    tree = tmp_path / "newer"
    for source in SOURCES:
        shutil.copytree(ROOT / source, tree / source, ignore=shutil.ignore_patterns("__pycache__"))
    jobs = tree / "service/recoup_jobs"
    with installation.ledger.reading() as conn:
        head = ScriptDirectory.from_config(migrations(conn)).get_current_head()
    (jobs / "migrations/versions/next.py").write_text(REVISION.format(head=head))
    tables = (jobs / "tables.py").read_text()
    column = '    Column("created_at", Double, nullable=False),\n'
    assert column in tables
    (jobs / "tables.py").write_text(tables.replace(column, f'{column}    Column("note", String(64)),\n', 1))
    return Release(tree, installation)


class Load:
    """Clients that have so many recoveries open, always, while everything changes around them."""

    def __init__(self, installation):
        self._installation, self._ending = installation, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self._thread.join()

    def _run(self):
        while not self._ending.wait(PACE_SECONDS):
            if len(self._installation.jobs) < ended(self._installation) + OPEN:
                self._installation.submit()


def ended(installation):
    return sum(installation.state(id) == "succeeded" for id in list(installation.jobs))


def wait_for_more(installation, more, seconds=180):
    """Until so many more have ended well."""
    wanted, until = ended(installation) + more, time.monotonic() + seconds
    while ended(installation) < wanted:
        assert time.monotonic() < until, "nothing ends any more"
        time.sleep(0.2)


def stop(worker):
    worker.terminate()
    assert worker.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_an_upgrade_with_a_migration_under_load_loses_nothing(installation, older, newer):
    """What must hold in the end is checked by the installation's own fixture, as after every fault."""
    first, second = older.start_worker(), older.start_worker()
    with Load(installation):
        wait_for_more(installation, 1)
        newer.migrate()
        columns = {column["name"] for column in inspect(installation.ledger.engine).get_columns("jobs")}
        assert "note" in columns
        wait_for_more(installation, 2)  # the older release on the newer schema
        stop(first)
        third = older.start_worker()  # a host of the older release is restarted in the middle of it
        wait_for_more(installation, 2)
        newer.start_worker()  # both versions at once
        wait_for_more(installation, 2)
        stop(second)
        stop(third)
        newer.start_worker()
        wait_for_more(installation, 2)
    installation.wait_for_end()
    assert {installation.state(id) for id in installation.jobs} == {"succeeded"}
    claims = [installation.ledger.get(id) for id in installation.jobs]
    assert sum(job.losses for job in claims) == 0
    assert sum(job.failures for job in claims) == 0


def test_a_release_starts_on_the_schema_of_a_later_one(installation, older, newer):
    newer.migrate()
    worker = older.start_worker()
    id = installation.submit()
    installation.wait_for_end()
    assert installation.state(id) == "succeeded"
    stop(worker)
