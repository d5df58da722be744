"""A new job is entered in two indexes less: one by state serves all tenants and each; no end, no entry."""

import sqlalchemy as sa
from alembic import op

revision = "fewer_indexes"
down_revision = "live_jobs"


def upgrade() -> None:
    op.create_index("ix_jobs_state_tenant", "jobs", ["state", "tenant"])
    op.drop_index("ix_jobs_tenant_state", "jobs")
    op.drop_index("ix_jobs_state", "jobs")
    ended = sa.text("finished_at IS NOT NULL")
    op.create_index("ix_jobs_ended", "jobs", ["finished_at"], sqlite_where=ended, postgresql_where=ended)
    op.drop_index("ix_jobs_finished_at", "jobs")
