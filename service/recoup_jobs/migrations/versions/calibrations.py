"""How long stages of finished jobs took, by class of machine; and which machines there are."""

import sqlalchemy as sa
from alembic import op

revision = "calibrations"
down_revision = "webhooks"


def upgrade() -> None:
    op.create_table(
        "calibrations",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("queue", sa.String(64), nullable=False, index=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("work", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_table(
        "machines",
        sa.Column("owner", sa.String(200), primary_key=True),
        sa.Column("queue", sa.String(64), nullable=False, index=True),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
