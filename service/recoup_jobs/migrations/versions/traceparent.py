"""The trace of the request that made a job."""

import sqlalchemy as sa
from alembic import op

revision = "traceparent"
down_revision = "deployments"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(55)))
