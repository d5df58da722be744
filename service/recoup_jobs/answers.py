"""What was answered to a request with an Idempotency-Key, so that a retry gets the same and does nothing.

The answer is written in the transaction that creates the thing: either both are there or neither, whatever
crashes when. Two requests with one key that race both try to write it, and the second one's transaction
fails as a whole on the primary key.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import answers, now

KEPT_SECONDS = 48 * 3600.0


@dataclass(frozen=True)
class Request:
    """What a retry must repeat."""

    tenant: str
    key: str
    fingerprint: str
    """SHA-256 of what was asked."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


@dataclass(frozen=True)
class Given:
    """An answer, and to what it was given."""

    fingerprint: str
    answer: Answer


def remember(conn: Connection, to: Request, answer: Answer) -> None:
    """Belongs into the transaction that creates; raises `IntegrityError` where the key has its answer."""
    conn.execute(delete(answers).where(answers.c.created_at < now() - KEPT_SECONDS))
    conn.execute(insert(answers).values(created_at=now(), **vars(to), **vars(answer)))


def recall(ledger: Ledger, to: Request) -> Given | None:
    query = select(answers).where(answers.c.tenant == to.tenant, answers.c.key == to.key)
    with ledger.reading() as conn:
        row = conn.execute(query).first()
    return None if row is None else Given(row.fingerprint, Answer(row.status, row.headers, row.body))
