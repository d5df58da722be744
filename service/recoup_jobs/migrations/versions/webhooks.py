"""Webhooks, and what was sent to them."""

import sqlalchemy as sa
from alembic import op

revision = "webhooks"
down_revision = "answers"


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False, index=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("events", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("disabled_at", sa.Double),
    )
    op.create_table(
        "deliveries",
        sa.Column("webhook_id", sa.String(32), sa.ForeignKey("webhooks.id"), primary_key=True),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Double, index=True),
        sa.Column("last_answer", sa.String(64)),
    )
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
