"""The rows of uploaded files; their bytes lie in `Settings.files_dir` (see `datasets.py`)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from recoup.schemas import File, Page
from recoup_jobs.errors import BadRequest, Conflict, NotFound
from recoup_jobs.ledger import Ledger
from recoup_jobs.lifecycle import NEXT
from recoup_jobs.pages import page
from recoup_jobs.rows import RowKind
from recoup_jobs.tables import files, jobs, now

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
LIVE_STATES = [state for state, following in NEXT.items() if following]


@dataclass(frozen=True)
class NewFile:
    """What is known of a file once its last line was checked."""

    id: str
    filename: str
    purpose: str
    kind: RowKind
    bytes: int
    rows: int
    sha256: str
    tenant: str


Also = Callable[[Connection, File], None]
"""What else belongs into the transaction that makes a file known."""


def add(ledger: Ledger, new: NewFile, also: Also) -> File:
    with ledger.engine.begin() as conn:
        conn.execute(insert(files).values(created_at=now(), **vars(new)))
        file = _file(_row(conn, new.id))
        also(conn, file)
        return file


def get(ledger: Ledger, id: str, tenant: str) -> File:
    with ledger.reading() as conn:
        return _file(_row(conn, id, tenant))


def kind(ledger: Ledger, id: str, tenant: str | None = None) -> RowKind:
    """What the rows of this file are; of this tenant's or, for a worker, of anybody's."""
    with ledger.reading() as conn:
        found: RowKind = _row(conn, id, tenant).kind
        return found


def rows(ledger: Ledger, id: str) -> int:
    """How many this file has."""
    with ledger.reading() as conn:
        return int(_row(conn, id).rows)


def find(
    ledger: Ledger,
    tenant: str,
    after: str | None,
    limit: int,
    purpose: str | None = None,
    oldest_first: bool = False,
) -> Page[File]:
    """Newest first, unless told otherwise."""
    order = files.c.number.asc() if oldest_first else files.c.number.desc()
    query = select(files).where(files.c.tenant == tenant).order_by(order).limit(limit + 1)
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    with ledger.reading() as conn:
        if after is not None:
            seen = _cursor(conn, after, tenant)
            query = query.where(files.c.number > seen if oldest_first else files.c.number < seen)
        found = [_file(row) for row in conn.execute(query)]
    return page(found, limit, lambda file: file.id)


def remove(ledger: Ledger, id: str, tenant: str) -> None:
    """Refused while a recovery that has not ended names the file."""
    in_use = select(jobs.c.id).where(jobs.c.state.in_(LIVE_STATES), jobs.c.request.contains(id))
    with ledger.engine.begin() as conn:
        _row(conn, id, tenant)
        if (user := conn.execute(in_use.limit(1)).scalar()) is not None:
            raise Conflict(
                "file_in_use", f"recovery {user} still needs this file; cancel it or wait for its end"
            )
        conn.execute(delete(files).where(files.c.id == id))


def _row(conn: Connection, id: str, tenant: str | None = None) -> Row[Any]:
    """Of this tenant; or, for a worker, of any."""
    query = select(files).where(files.c.id == id)
    if tenant is not None:
        query = query.where(files.c.tenant == tenant)
    row = conn.execute(query).first() if FILE_ID.fullmatch(id) else None
    if row is None:
        raise NotFound("file_not_found", "there is no file of this id; upload one with POST /v1/files")
    return row


def _cursor(conn: Connection, after: str, tenant: str) -> int:
    try:
        return int(_row(conn, after, tenant).number)
    except NotFound:
        raise BadRequest("invalid_cursor", "`after` must be the next_cursor of an earlier page") from None


def _file(row: Row[Any]) -> File:
    return File(
        id=row.id,
        object="file",
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        status="processed",
        rows=row.rows,
        sha256=row.sha256,
    )
