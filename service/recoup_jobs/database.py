"""How the ledger's database is opened and brought up to date: SQLite by default, PostgreSQL by URL.

SQLite: WAL, so that readers never wait for the writer; every write transaction is `BEGIN
IMMEDIATE`, because a reader that turns into a writer fails at once instead of waiting;
`synchronous=FULL`, because a claim must survive power loss. One host, a local disk. A process
writes over one connection, for which its threads queue, and whose cache of pages nobody else
makes stale. Who waits for the writer of another process asks again at short random intervals:
SQLite's own handler asks the less often the longer it has waited, so that under load the oldest
waiter never gets its turn.

Migrations run once, under a lock that all processes of an installation share.
"""

import fcntl
import json
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATION_LOCK = 0x7265636F7570  # "recoup"

AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""How it shows that the database cannot be reached, or will not answer in time."""
PAUSE_SECONDS = 0.25
READER_BUSY_SECONDS = WRITER_BUSY_SECONDS = 15.0
POSTGRESQL = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
"""A server that vanished without a word is noticed before a lease runs out."""

HABITS: dict[str, Any] = {
    "json_serializer": partial(json.dumps, allow_nan=False),
    "hide_parameters": True,
}
"""JSON with NaN is refused; the values of a statement appear in no error, and so in no log."""

log = logging.getLogger(__name__)


def connect(url: str) -> Engine:
    """An engine with the right habits; nothing is opened yet."""
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, connect_args=POSTGRESQL, **HABITS)
    one = {"pool_size": 1, "max_overflow": 0, "pool_timeout": WRITER_BUSY_SECONDS}
    engine = create_engine(url, connect_args={"timeout": 0}, **one, **HABITS)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_to_write)
    return engine


def reader_of(engine: Engine) -> Engine:
    """The engine of those who only read: they never wait for a writer.

    Each statement sees one state of the database, two may see two: as on PostgreSQL.
    """
    if engine.dialect.name != "sqlite":
        return engine
    as_many_as_ask: dict[str, Any] = {"max_overflow": -1, "connect_args": {"timeout": READER_BUSY_SECONDS}}
    reader = create_engine(engine.url, **as_many_as_ask, **HABITS)
    event.listen(reader, "connect", _set_up_sqlite)
    return reader


def patiently(write: Callable[[], None], seconds: float) -> None:
    """Tries a transaction again while the database is away, for so long.

    One whose commit was done but not acknowledged comes a second time, so it must bear that.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return write()
        except AWAY:
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE_SECONDS)


def migrate(engine: Engine) -> None:
    """Brings the schema to the newest revision, once, however many processes ask.

    A schema that a later release made is left as it is: revisions only add (docs/10-operations.md),
    so this release works on it while the later one takes over, machine by machine.
    """
    with _migration_lock(engine), engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        config = migrations(connection)
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None or current in known:
            command.upgrade(config, "head")
        else:
            log.warning("the schema is at %s, which a later release made; it is left as it is", current)


def migrations(connection: Connection) -> Config:
    """Alembic's view of the revisions, for this connection and inside its transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _migration_lock(engine: Engine) -> Iterator[None]:
    """SQLite's part of the lock; PostgreSQL's lives in the transaction."""
    if engine.dialect.name != "sqlite":
        yield
        return
    with Path(f"{engine.url.database}.migrating").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with closing(sqlite3.connect(str(engine.url.database))) as raw:
            raw.execute("PRAGMA journal_mode = WAL")
        yield


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    for pragma in ("foreign_keys = ON", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_to_write(connection: Connection) -> None:
    # Beneath SQLAlchemy, whose own way to a small statement costs more than the statement.
    driver: Any = connection.connection.dbapi_connection
    until = time.monotonic() + WRITER_BUSY_SECONDS
    while not _has_turn(driver):
        if time.monotonic() > until:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises what SQLAlchemy's callers catch
            break
        time.sleep(random.uniform(0.001, 0.005))


def _has_turn(driver: sqlite3.Connection) -> bool:
    try:
        driver.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True
