"""The machines that workers have told of: which class, how much memory. What fits none is not queued."""

from sqlalchemy import delete, func, insert, select

from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import machines, now

REMEMBERED_SECONDS = 7 * 86_400.0
"""A worker that was not heard of for so long is gone; until then it may come back."""


def announce(ledger: Ledger, owner: str, queue: str, memory_bytes: int) -> None:
    """`memory_bytes`: of the device that a runner has for itself."""
    row = {"owner": owner, "queue": queue, "memory_bytes": memory_bytes}
    with ledger.engine.begin() as conn:
        forgotten = machines.c.seen_at < now() - REMEMBERED_SECONDS
        conn.execute(delete(machines).where((machines.c.owner == owner) | forgotten))
        conn.execute(insert(machines).values(seen_at=now(), **row))


def most_memory(ledger: Ledger, queue: str) -> int | None:
    """Of one machine of this class, in bytes; None where no worker has told of itself."""
    query = select(func.max(machines.c.memory_bytes)).where(
        machines.c.queue == queue, machines.c.seen_at > now() - REMEMBERED_SECONDS
    )
    with ledger.reading() as conn:
        found: int | None = conn.execute(query).scalar_one()
        return found
