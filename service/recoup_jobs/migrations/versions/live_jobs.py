"""How many live jobs a tenant has is counted in an index, however many have ended."""

from alembic import op

revision = "live_jobs"
down_revision = "traceparent"


def upgrade() -> None:
    op.create_index("ix_jobs_tenant_state", "jobs", ["tenant", "state"])
