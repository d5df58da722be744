from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Boolean, Float, Integer, MetaData, String, insert, select, text, update

from recoup_jobs.database import MIGRATIONS, connect, migrate, migrations
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import jobs, metadata

OLD_JOB = """
INSERT INTO jobs (id, state, request, priority, queue, epoch, version, last_seq, owner, lease_until,
                  application_failures, infrastructure_losses, created_at)
VALUES ('rec_000000000000000000000001', 'running', :request, 0, 'gpu.cpu', 1, 3, 1, 'gone', 5.0, 1, 2, 1.0)
"""

SCRIPTS = ScriptDirectory(str(MIGRATIONS))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
VALUES = {String: "rec_000000000000000000000001", Boolean: True, Integer: 7, Float: 1.5, JSON: {"a": [1]}}
"""One of each kind, the same in all tables, so that references hold."""

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


def test_an_upgrade_keeps_the_jobs_of_the_first_revision_and_their_history(settings, asked):
    settings.home.mkdir()
    engine = connect(str(settings.database_url))
    with engine.begin() as conn:
        command.upgrade(migrations(conn), "0001")
        conn.execute(text(OLD_JOB), {"request": asked.model_dump_json()})
        conn.execute(
            text("INSERT INTO events VALUES ('rec_000000000000000000000001', 1, 1, 'log', '{}', 3.0)")
        )
    migrate(engine)
    ledger = Ledger(engine)
    (job,) = ledger.list(None, 10).data
    assert (job.state, job.epoch, job.losses, job.pausing, job.request) == ("running", 1, 2, False, asked)
    assert [event.seq for event in ledger.events(job.id, 0, 10).data] == [1]
    assert ledger.claim("worker", ["gpu.cpu"], 30).epoch == 2
    assert ledger.lead("sweeper", "me", 30)
    ledger.close()


def test_who_reads_waits_for_nobody_who_writes(ledger, asked):
    id = ledger.create(asked, "gpu.cpu").id
    with ledger.engine.begin() as conn:
        conn.execute(update(jobs).values(priority=7, version=2))
        assert ledger.get(id).version == 1
    assert ledger.get(id).version == 2


def test_many_threads_write_each_in_its_turn(ledger, asked):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: ledger.create(asked, "gpu.cpu").id, range(64)))
    assert len({*made}) == 64
    assert len(ledger.list(None, 100).data) == 64


@pytest.fixture
def engine(settings):
    settings.home.mkdir()
    engine = connect(str(settings.database_url))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS)
def test_an_upgrade_from_any_revision_keeps_every_value_of_every_table(engine, revision):
    with engine.begin() as conn:
        command.upgrade(migrations(conn), revision)
    before = MetaData()
    before.reflect(engine)
    with engine.begin() as conn:
        for table in filled(before):
            conn.execute(insert(table).values(row_of(table)))
    migrate(engine)
    with engine.begin() as conn:
        for table in filled(before):
            assert row_of(table) in [row._asdict() for row in conn.execute(select(table))], table.name


def test_the_revisions_are_one_line_to_what_the_code_reads(engine):
    migrate(engine)
    with engine.connect() as conn:
        assert MigrationContext.configure(conn).get_current_heads() == (REVISIONS[-1],)
    assert SCRIPTS.get_heads() == [REVISIONS[-1]]


def filled(tables):
    """Parents before their children."""
    return [table for table in tables.sorted_tables if table.name != "alembic_version"]


def row_of(table):
    """A row with a value in every column, as long as the column bears."""
    row = {}
    for column in table.columns:
        (value,) = [value for kind, value in VALUES.items() if isinstance(column.type, kind)]
        row[column.name] = value[: column.type.length] if isinstance(value, str) else value
    return row
