"""Who may work on a job: a lease that must be renewed, and an epoch that fences the rest off.

A worker that takes a job up raises its `epoch`. Every later write carries that number; a
worker that slept past its lease finds a higher one in the row and is refused. This is the
fencing token of Kleppmann's "How to do distributed locking" (2016). The lease runs by the
database's clock. Nothing here opens a transaction: the ledger does.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Subquery, and_, func, or_, select

from recoup.schemas import CreateRecovery, State
from recoup_jobs.errors import StaleClaim
from recoup_jobs.history import move
from recoup_jobs.lifecycle import HELD_STATES
from recoup_jobs.metrics import LEASE_LOSSES, REFUSED_WRITES
from recoup_jobs.tables import jobs, now


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until somebody else takes it up."""

    job_id: str
    epoch: int
    request: CreateRecovery
    spent_seconds: float = 0.0
    """For how long earlier claims held the job."""
    memory_failures: int = 0
    """How often it ran out of memory before: a micro-batch is to be halved as often."""
    traceparent: str | None = None
    """The trace that it belongs to."""


def take(
    conn: Connection, owner: str, queues: list[str], lease_seconds: float, only: str | None, max_losses: int
) -> Claim | None:
    """The best job that is free, claimed; on the way, jobs whose worker vanished are given back."""
    while (job := conn.execute(_best(queues, only)).first()) is not None:
        if job.state == "queued":
            return _claimed(conn, job, owner, lease_seconds)
        give_back(conn, job, max_losses, "lease_expired")
    return None


def claim_of(job: Row[Any], epoch: int) -> Claim:
    request = CreateRecovery.model_validate_json(job.request)
    return Claim(job.id, epoch, request, job.spent_seconds, job.memory_failures, job.traceparent)


def fence(conn: Connection, claim: Claim) -> Row[Any]:
    """The claimed job's row, locked; raises `StaleClaim` if it is no longer this claim's to write."""
    job = conn.execute(select(jobs).where(held_by(claim)).with_for_update()).first()
    if job is None:
        REFUSED_WRITES.inc()
        raise StaleClaim(
            "stale_claim", f"epoch {claim.epoch} no longer holds recovery {claim.job_id}; stop working on it"
        )
    return job


def held_by(claim: Claim) -> ColumnElement[bool]:
    return and_(jobs.c.id == claim.job_id, jobs.c.epoch == claim.epoch, jobs.c.state.in_(HELD_STATES))


def abandoned() -> ColumnElement[bool]:
    """A worker held the job and let its lease run out."""
    return and_(jobs.c.state.in_(HELD_STATES), jobs.c.lease_until < now())


def without_worker(job: Row[Any]) -> State:
    """Where a job goes whose worker lets go of it before its end."""
    if job.state == "cancelling":
        return "cancelled"
    return "paused" if job.pausing else "queued"


def _best(queues: list[str], only: str | None) -> Select[Any]:
    """Abandoned jobs first; then by priority, by how few jobs of its tenant run, and by arrival.

    Rows that another worker looks at are skipped.
    """
    running = _running(queues)
    free = select(jobs).join_from(jobs, running, jobs.c.tenant == running.c.tenant, isouter=True)
    free = free.where(jobs.c.queue.in_(queues), or_(jobs.c.state == "queued", abandoned()))
    if only is not None:
        free = free.where(jobs.c.id == only)
    share = func.coalesce(running.c.number, 0)
    in_order = free.order_by(jobs.c.state == "queued", jobs.c.priority.desc(), share, jobs.c.number)
    return in_order.limit(1).with_for_update(skip_locked=True, of=jobs)


def _running(queues: list[str]) -> Subquery:
    """How many jobs of each tenant hold machines of these classes."""
    held = select(jobs.c.tenant, func.count().label("number"))
    held = held.where(jobs.c.state.in_(HELD_STATES), jobs.c.queue.in_(queues))
    return held.group_by(jobs.c.tenant).subquery()


def _claimed(conn: Connection, job: Row[Any], owner: str, lease_seconds: float) -> Claim:
    epoch = job.epoch + 1
    lease = {"owner": owner, "lease_until": now() + lease_seconds, "claimed_at": now(), "epoch": epoch}
    started_at = now() if job.started_at is None else job.started_at
    move(conn, job, "running", started_at=started_at, **lease)
    return claim_of(job, epoch)


def give_back(conn: Connection, job: Row[Any], max_losses: int, reason: str) -> None:
    """Queues a job again whose worker or runner vanished, or fails it if that happened too often."""
    LEASE_LOSSES.labels(reason).inc()
    if job.state == "cancelling":
        return move(conn, job, "cancelled", {"reason": reason})
    losses = job.infrastructure_losses + 1
    if losses < max_losses:
        return move(conn, job, without_worker(job), {"reason": reason}, infrastructure_losses=losses)
    message = f"{losses} times a worker or its runner vanished while it held this job"
    error = {"code": "infrastructure_losses", "message": message}
    return move(conn, job, "failed", {"error": error}, error=error, infrastructure_losses=losses)
