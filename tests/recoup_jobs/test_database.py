from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.database import connect, migrate, migrations
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import metadata

OLD_JOB = """
INSERT INTO jobs (id, state, request, priority, queue, epoch, version, last_seq, owner, lease_until,
                  application_failures, infrastructure_losses, created_at)
VALUES ('rec_000000000000000000000001', 'running', :request, 0, 'gpu.cpu', 1, 3, 1, 'gone', 5.0, 1, 2, 1.0)
"""

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


def test_the_migrations_build_the_tables_that_the_code_reads(ledger):
    with ledger.engine.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []


def test_processes_that_start_together_migrate_once(settings):
    settings.home.mkdir()
    engines = [connect(str(settings.database_url)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(migrate, engines)) == [None] * 4
    for engine in engines:
        engine.dispose()


def test_an_upgrade_keeps_the_jobs_of_the_first_revision_and_their_history(settings):
    settings.home.mkdir()
    engine = connect(str(settings.database_url))
    request = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    with engine.begin() as conn:
        command.upgrade(migrations(conn), "0001")
        conn.execute(text(OLD_JOB), {"request": request.model_dump_json()})
        conn.execute(
            text("INSERT INTO events VALUES ('rec_000000000000000000000001', 1, 1, 'log', '{}', 3.0)")
        )
    migrate(engine)
    ledger = Ledger(engine)
    (job,) = ledger.list(None, 10).data
    assert (job.state, job.epoch, job.losses, job.pausing, job.request) == ("running", 1, 2, False, request)
    assert [event.seq for event in ledger.events(job.id, 0, 10).data] == [1]
    assert ledger.claim("worker", ["gpu.cpu"], 30).epoch == 2
    assert ledger.lead("sweeper", "me", 30)
    engine.dispose()
