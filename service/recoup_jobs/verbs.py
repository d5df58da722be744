"""What clients ask of a job that exists: cancel, pause, resume, retry, another priority, other metadata.

A job that no worker holds obeys at once. One that is held is only asked: the wish is kept in
its row, its supervisor reads it with the next renewal of the lease, and the worker's release
makes it come true. Nothing here opens a transaction: the ledger does.
"""

from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from recoup.schemas import ChangeRecovery, CreateRecovery
from recoup_jobs.history import append, move
from recoup_jobs.lifecycle import require
from recoup_jobs.tables import jobs, now, stages


def cancel(conn: Connection, job: Row[Any]) -> None:
    """A job that waits ends at once; a running one is asked to stop, and asking again changes nothing."""
    require("cancel", job.state)
    if job.state != "cancelling":
        move(conn, job, "cancelling" if job.state == "running" else "cancelled")


def pause(conn: Connection, job: Row[Any]) -> None:
    """A queued job waits from now on; a running one is asked to give its device back."""
    require("pause", job.state)
    if job.state == "queued":
        move(conn, job, "paused")
    elif not job.pausing:
        _wish(conn, job, pausing=True)


def resume(conn: Connection, job: Row[Any]) -> None:
    """Queues a paused job again; takes a pause back that its worker has not yet heard of."""
    if job.pausing:
        return _wish(conn, job, pausing=False)
    require("resume", job.state)
    return move(conn, job, "queued")


def retry(conn: Connection, job: Row[Any], id: str) -> None:
    """A new job of this id for what failed or was cancelled; what is committed need not be done again."""
    require("retry", job.state)
    kept = {name: getattr(job, name) for name in ("request", "priority", "queue")}
    inherited = conn.execute(
        select(stages).where(stages.c.job_id == job.id, stages.c.stage != "package")
    ).all()
    new = {"id": id, "state": "queued", "retry_of": job.id, "created_at": now()}
    conn.execute(insert(jobs).values(kept | new))
    for stage in inherited:
        conn.execute(insert(stages).values(stage._asdict() | {"job_id": id}))
    data = {"state": "queued", "from": None, "retry_of": job.id}
    append(conn, id, 0, "state", data | {"committed": [stage.stage for stage in inherited]})


def change(conn: Connection, job: Row[Any], asked: ChangeRecovery) -> None:
    """Another priority while that may matter; other metadata at any time."""
    if asked.priority is not None:
        require("prioritise", job.state)
    changes = asked.model_dump(exclude_none=True)
    request = CreateRecovery.model_validate_json(job.request).model_copy(update=changes)
    values = {"request": request.model_dump_json(), "priority": request.priority}
    conn.execute(update(jobs).where(jobs.c.id == job.id).values(values | {"version": jobs.c.version + 1}))


def _wish(conn: Connection, job: Row[Any], pausing: bool) -> None:
    changed = {"pausing": pausing, "version": jobs.c.version + 1}
    conn.execute(update(jobs).where(jobs.c.id == job.id).values(changed))
    message = "asked to pause" if pausing else "no longer asked to pause"
    append(conn, job.id, job.epoch, "log", {"message": message})
