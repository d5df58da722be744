"""How much one tenant may have at a time: jobs exactly, stored bytes as they were before a file is taken."""

from sqlalchemy import Connection, bindparam, func, or_, select

from recoup_jobs.catalog import LIVE_STATES
from recoup_jobs.errors import TooMany
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import files, jobs

LATER_SECONDS = 60
_IS_LIVE = or_(*(jobs.c.state == state for state in LIVE_STATES))  # compiled once, as an IN is not
_LIVE = select(func.count()).where(jobs.c.tenant == bindparam("tenant"), _IS_LIVE)


def require_room_for_job(conn: Connection, tenant: str, most: int) -> None:
    """`most` recoveries that have not ended; belongs behind the making of one, into its transaction."""
    if conn.execute(_LIVE, {"tenant": tenant}).scalar_one() > most:
        message = f"{most} recoveries wait or run already; wait for one to end"
        raise TooMany("quota_exceeded", message, LATER_SECONDS)


def require_room_for_file(ledger: Ledger, tenant: str, most_bytes: int) -> None:
    stored = select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.tenant == tenant)
    with ledger.reading() as conn:
        if conn.execute(stored).scalar_one() >= most_bytes:
            message = f"data sets of {most_bytes} bytes are stored already; delete some"
            raise TooMany("quota_exceeded", message, LATER_SECONDS)
