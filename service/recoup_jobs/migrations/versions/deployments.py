"""Deployments, and how they stand on the servers."""

import sqlalchemy as sa
from alembic import op

revision = "deployments"
down_revision = "calibrations"


def upgrade() -> None:
    op.create_table(
        "deployments",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("tenant", sa.String(64), nullable=False, server_default="default"),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("reason", sa.JSON),
        sa.Column("recovery_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("lineage", sa.JSON, nullable=False),
        sa.Column("launch", sa.JSON, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("live_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deployments_tenant", "deployments", ["tenant", "name", "number"])
    op.create_table(
        "placements",
        sa.Column("deployment_id", sa.String(32), sa.ForeignKey("deployments.id"), primary_key=True),
        sa.Column("replica", sa.String(255), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.JSON),
        sa.Column("checked_at", sa.Double, nullable=False),
    )
    leaders = sa.table("leaders", sa.column("role"), sa.column("owner"), sa.column("until"))
    op.bulk_insert(leaders, [{"role": "reconciler", "owner": None, "until": 0.0}])
