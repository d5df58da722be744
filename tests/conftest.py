"""Fixtures that tests of several packages share."""

import os
import socket
import uuid

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

POSTGRESQL = os.environ.get("RECOUP_TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def database(request):
    """None, which is SQLite, or the URL of a PostgreSQL schema that this test has for itself."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield None
        return
    schema = f"recoup_{uuid.uuid4().hex[:12]}"
    server = create_engine(POSTGRESQL, connect_args={"connect_timeout": 2})
    try:
        with server.begin() as conn:
            conn.execute(text(f"CREATE SCHEMA {schema}"))
    except OperationalError as error:
        pytest.skip(f"no PostgreSQL answers at {POSTGRESQL}: {error}")
    yield f"{POSTGRESQL}?options=-csearch_path%3D{schema}"
    with server.begin() as conn:
        conn.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    server.dispose()
