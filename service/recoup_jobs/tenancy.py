"""Whose things are: another tenant's job is as unknown as one that never was."""

from sqlalchemy import bindparam, select

from recoup_jobs.errors import NotFound
from recoup_jobs.kinds import JOB_ID, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import jobs

_OWN = select(jobs.c.id).where(jobs.c.id == bindparam("id"), jobs.c.tenant == bindparam("tenant"))


def require_own_job(ledger: Ledger, id: str, tenant: str) -> None:
    with ledger.reading() as conn:
        if not JOB_ID.fullmatch(id) or conn.execute(_OWN, {"id": id, "tenant": tenant}).first() is None:
            kind = kind_of(id)
            raise NotFound(f"{kind}_not_found", f"there is no {kind} of this id")
