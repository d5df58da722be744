"""Pauses, retries, time spent, failures of memory, and who leads the sweepers."""

import sqlalchemy as sa
from alembic import op

revision = "durability"
down_revision = "0001"


def upgrade() -> None:
    for column in (
        sa.Column("memory_failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("pausing", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("retry_of", sa.String(32)),
        sa.Column("claimed_at", sa.Double),
        sa.Column("spent_seconds", sa.Double, nullable=False, server_default="0"),
        sa.Column("cleared_at", sa.Double),
    ):
        op.add_column("jobs", column)
    leaders = op.create_table(
        "leaders",
        sa.Column("role", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(200)),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.bulk_insert(leaders, [{"role": "sweeper", "owner": None, "until": 0.0}])
