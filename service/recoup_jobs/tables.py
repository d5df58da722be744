"""The tables of the ledger, and the database's own clock.

Times are Unix seconds. `jobs.number` orders jobs by arrival, `jobs.id` is what the world
sees. `jobs.last_seq` counts the job's events, so that `events.seq` has no gaps. The
request stays the JSON text that was accepted. `jobs.published_at` is the outbox: NULL means
that nobody was told of the job yet. A row of `leaders` says who does what only one may do.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData()
Number = BigInteger().with_variant(Integer, "sqlite")

DEFAULT_TENANT = "default"
"""Whose everything is, where keys name no other."""


def _tenant() -> Column[str]:
    return Column("tenant", String(64), nullable=False, default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)


_ENDED = text("finished_at IS NOT NULL")

jobs = Table(
    "jobs",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("stage", String(16)),
    Column("outcome", String(16)),
    Column("error", JSON(none_as_null=True)),
    Column("progress", JSON(none_as_null=True)),
    Column("request", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("queue", String(64), nullable=False),
    Column("epoch", Integer, nullable=False, default=0),
    Column("version", Integer, nullable=False, default=1),
    Column("last_seq", Integer, nullable=False, default=0),
    Column("owner", String(200)),
    Column("lease_until", Double),
    Column("application_failures", Integer, nullable=False, default=0),
    Column("infrastructure_losses", Integer, nullable=False, default=0),
    Column("memory_failures", Integer, nullable=False, default=0),
    Column("pausing", Boolean, nullable=False, default=False),
    Column("retry_of", String(32)),
    Column("claimed_at", Double),
    Column("spent_seconds", Double, nullable=False, default=0.0),
    Column("published_at", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("cleared_at", Double),
    Column("traceparent", String(55)),
    _tenant(),
    Index("ix_jobs_tenant", "tenant", "number"),
    Index("ix_jobs_state_tenant", "state", "tenant"),
    Index("ix_jobs_ended", "finished_at", sqlite_where=_ENDED, postgresql_where=_ENDED),
    sqlite_autoincrement=True,
)

stages = Table(
    "stages",
    metadata,
    Column("job_id", String(32), ForeignKey(jobs.c.id), primary_key=True),
    Column("stage", String(16), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("folder", Text, nullable=False),
    Column("committed_at", Double, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(32), ForeignKey(jobs.c.id), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("type", String(16), nullable=False),
    Column("data", JSON, nullable=False),
    Column("at", Double, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    _tenant(),
    Index("ix_files_tenant", "tenant", "number"),
    sqlite_autoincrement=True,
)

leaders = Table(
    "leaders",
    metadata,
    Column("role", String(32), primary_key=True),
    Column("owner", String(200)),
    Column("until", Double, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("prefix", String(16), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)

answers = Table(
    "answers",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("headers", JSON, nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("events", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("disabled_at", Double),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("webhook_id", String(32), ForeignKey(webhooks.c.id), primary_key=True),
    Column("job_id", String(32), ForeignKey(jobs.c.id), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, index=True),
    Column("last_answer", String(64)),
)

deployments = Table(
    "deployments",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    _tenant(),
    Column("name", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("reason", JSON(none_as_null=True)),
    Column("recovery_id", String(32), ForeignKey(jobs.c.id), nullable=False),
    Column("lineage", JSON, nullable=False),
    Column("launch", JSON, nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("live_at", Double),
    Column("ended_at", Double),
    Index("ix_deployments_tenant", "tenant", "name", "number"),
    sqlite_autoincrement=True,
)

placements = Table(
    "placements",
    metadata,
    Column("deployment_id", String(32), ForeignKey(deployments.c.id), primary_key=True),
    Column("replica", String(255), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", JSON(none_as_null=True)),
    Column("checked_at", Double, nullable=False),
)


calibrations = Table(
    "calibrations",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("queue", String(64), nullable=False, index=True),
    Column("job_id", String(32), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("mode", String(16), nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("work", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("at", Double, nullable=False),
)


machines = Table(
    "machines",
    metadata,
    Column("owner", String(200), primary_key=True),
    Column("queue", String(64), nullable=False, index=True),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("seen_at", Double, nullable=False),
)


class now(FunctionElement[float]):  # noqa: N801 - an SQL function
    """Unix seconds by the database's clock: leases never compare the clocks of two machines."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(*_: Any, **__: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
