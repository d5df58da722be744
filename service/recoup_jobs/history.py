"""The only ways in which a job's row and its history change together.

`begin` makes a job, `move` takes it to another state, `append` adds an event; all belong into the caller's
transaction, so a row and its history cannot disagree.
"""

from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, case, insert, update

from recoup.schemas import State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.lifecycle import HELD_STATES, check
from recoup_jobs.scrubber import scrubbed
from recoup_jobs.tables import events, jobs, now

EventType = Literal["state", "stage", "metric", "log"]


_NEW_JOB = insert(jobs).values(created_at=now(), last_seq=1).returning(jobs)
_FIRST_EVENT = insert(events).values(at=now(), seq=1, epoch=0, type="state")


def begin(conn: Connection, row: dict[str, Any]) -> Row[Any]:
    """A queued job and its first event, by two statements that were built once."""
    job = conn.execute(_NEW_JOB, {"state": "queued"} | row).one()
    conn.execute(_FIRST_EVENT, {"job_id": job.id, "data": {"state": "queued", "from": None}})
    return job


def move(
    conn: Connection, job: Row[Any], new: State, /, data: dict[str, Any] | None = None, **columns: Any
) -> None:
    """One legal step: the state, what the state implies, a new version and the event.

    Raises `Conflict` where the step is not in the table of `lifecycle.py`.
    """
    check(job.state, new)
    values = {"state": new, "version": jobs.c.version + 1} | _implied_by(job, new) | columns
    conn.execute(update(jobs).where(jobs.c.id == job.id).values(values))
    append(
        conn,
        job.id,
        columns.get("epoch", job.epoch),
        "state",
        {"state": new, "from": job.state} | (data or {}),
    )


def append(conn: Connection, job_id: str, epoch: int, type: EventType, data: dict[str, Any]) -> None:
    """The job's next event. The row's own counter numbers it, under the row's lock: no gap, no twin."""
    counted = update(jobs).where(jobs.c.id == job_id).values(last_seq=jobs.c.last_seq + 1)
    seq = conn.execute(counted.returning(jobs.c.last_seq)).scalar_one()
    told = scrubbed(data)
    row = {"job_id": job_id, "seq": seq, "epoch": epoch, "type": type, "data": told, "at": now()}
    conn.execute(insert(events).values(row))


def _implied_by(job: Row[Any], new: State) -> dict[str, Any]:
    implied: dict[str, Any] = {}
    if new not in HELD_STATES:
        implied |= {"owner": None, "lease_until": None, "claimed_at": None, "progress": None}
        implied |= {"pausing": False}
        if job.claimed_at is not None:
            implied |= {"spent_seconds": jobs.c.spent_seconds + _held_for()}
    if new == "queued":
        implied |= {"published_at": None}
    if new in TERMINAL_STATES:
        implied |= {"finished_at": now()}
    return implied


def _held_for() -> ColumnElement[float]:
    """Seconds since the claim; a worker that vanished did not work past its lease."""
    until = case((jobs.c.lease_until < now(), jobs.c.lease_until), else_=now())
    return until - jobs.c.claimed_at
