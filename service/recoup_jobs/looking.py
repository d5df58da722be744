"""Where watched jobs stand, in one look at the ledger however many watch."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import bindparam, select

from recoup.schemas import State
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import jobs

_WATCHED = select(jobs.c.id, jobs.c.version, jobs.c.last_seq, jobs.c.state).where(
    jobs.c.id.in_(bindparam("ids", expanding=True))
)


@dataclass(frozen=True)
class Standing:
    version: int
    last_seq: int
    state: State


def standings(ledger: Ledger, ids: Collection[str]) -> dict[str, Standing]:
    with ledger.reading() as conn:
        rows = conn.execute(_WATCHED, {"ids": [*ids]})
        return {row.id: Standing(row.version, row.last_seq, row.state) for row in rows}
