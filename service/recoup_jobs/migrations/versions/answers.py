"""Answers that are given again to the same Idempotency-Key."""

import sqlalchemy as sa
from alembic import op

revision = "answers"
down_revision = "keys"


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False, index=True),
    )
