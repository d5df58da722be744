"""API keys, and whose a job or a file is."""

import sqlalchemy as sa
from alembic import op

revision = "keys"
down_revision = "durability"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("prefix", sa.String(16), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
    )
    for table in ("jobs", "files"):
        tenant = sa.Column("tenant", sa.String(64), nullable=False, server_default="default")
        op.add_column(table, tenant)
        op.create_index(f"ix_{table}_tenant", table, ["tenant", "number"])
