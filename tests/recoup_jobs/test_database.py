from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from recoup_jobs.database import connect, migrate
from recoup_jobs.tables import metadata

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
