"""Looks at the ledger from aside: where watched jobs stand, however many watch, and what happened last."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, bindparam, select

from recoup.schemas import Event, State
from recoup_jobs.ledger import Ledger, as_event
from recoup_jobs.tables import events, jobs

_WATCHED = select(jobs.c.id, jobs.c.version, jobs.c.last_seq, jobs.c.state).where(
    jobs.c.id.in_(bindparam("ids", expanding=True))
)


@dataclass(frozen=True)
class Standing:
    version: int
    last_seq: int
    state: State


def latest_events(
    ledger: Ledger, id: str, before: int, limit: int, *only: ColumnElement[bool]
) -> list[Event]:
    """Newest first, from the one before number `before`."""
    query = select(events).where(events.c.job_id == id, events.c.seq < before, *only)
    with ledger.reading() as conn:
        rows = conn.execute(query.order_by(events.c.seq.desc()).limit(limit))
        return [as_event(row) for row in rows]


def standings(ledger: Ledger, ids: Collection[str]) -> dict[str, Standing]:
    with ledger.reading() as conn:
        rows = conn.execute(_WATCHED, {"ids": [*ids]})
        return {row.id: Standing(row.version, row.last_seq, row.state) for row in rows}
