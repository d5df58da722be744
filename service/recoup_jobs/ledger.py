"""The ledger: what every job is, was and may become. The row is the truth; messages are hints.

Clients create, read and cancel. Workers claim, and then write under their claim's epoch.
Each method is one transaction; each change of state comes with its event. How claims work
stands in `claims.py`, how a row changes together with its history in `history.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, and_, insert, or_, select, update

from recoup.schemas import CreateRecovery, Event, JobError, Outcome, Page, Progress, Recovery, Stage, State
from recoup_jobs.claims import Claim, abandoned, fence, give_back, held_by, take
from recoup_jobs.database import READ_ONLY, connect, migrate
from recoup_jobs.errors import BadRequest, Conflict, NotFound
from recoup_jobs.history import EventType, append, move
from recoup_jobs.kinds import JOB_ID, PREFIXES, JobKind, kind_of, new_id
from recoup_jobs.pages import page
from recoup_jobs.settings import Settings
from recoup_jobs.tables import events, jobs, now, stages


def open_ledger(settings: Settings) -> "Ledger":
    """The installation's ledger, its schema brought up to date."""
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = connect(str(settings.database_url))
    migrate(engine)
    return Ledger(engine, settings.max_application_failures, settings.max_infrastructure_losses)


class Ledger:
    """Holds the database's engine; safe to share between threads, not across a fork."""

    def __init__(
        self, engine: Engine, max_application_failures: int = 3, max_infrastructure_losses: int = 5
    ) -> None:
        self.engine = engine
        self._reader = engine.execution_options(**READ_ONLY)
        self._max_failures = max_application_failures
        self._max_losses = max_infrastructure_losses

    def close(self) -> None:
        self.engine.dispose()

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection that never waits for a writer."""
        return self._reader.connect()

    # What clients do

    def create(self, request: CreateRecovery, queue: str, kind: JobKind = "recovery") -> Recovery:
        id = new_id(kind)
        row = {
            "id": id,
            "state": "queued",
            "request": request.model_dump_json(),
            "priority": request.priority,
            "queue": queue,
            "created_at": now(),
        }
        with self.engine.begin() as conn:
            conn.execute(insert(jobs).values(row))
            append(conn, id, 0, "state", {"state": "queued", "from": None})
            return _recovery(_job(conn, id))

    def get(self, id: str) -> Recovery:
        with self.reading() as conn:
            return _recovery(_job(conn, id))

    def list(self, after: str | None, limit: int, state: State | None = None) -> Page[Recovery]:
        """Newest first, from the recovery that came before `after`."""
        recoveries = jobs.c.id.startswith(PREFIXES["recovery"], autoescape=True)
        query = select(jobs).where(recoveries).order_by(jobs.c.number.desc()).limit(limit + 1)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with self.reading() as conn:
            if after is not None:
                query = query.where(jobs.c.number < _cursor(conn, after))
            found = [_recovery(row) for row in conn.execute(query)]
        return page(found, limit, lambda recovery: recovery.id)

    def events(self, id: str, after: int, limit: int) -> Page[Event]:
        """Oldest first, from the event that follows number `after`."""
        query = select(events).where(events.c.job_id == id, events.c.seq > after).order_by(events.c.seq)
        with self.reading() as conn:
            _job(conn, id)
            found = [_event(row) for row in conn.execute(query.limit(limit + 1))]
        return page(found, limit, lambda event: str(event.seq))

    def cancel(self, id: str) -> Recovery:
        """A queued job ends at once; a running one is asked to stop, and asking again changes nothing."""
        with self.engine.begin() as conn:
            job = _job(conn, id, lock=True)
            if job.state != "cancelling":
                move(conn, job, "cancelled" if job.state == "queued" else "cancelling")
            return _recovery(_job(conn, id))

    # What the sweeper does

    def due(self, republish_seconds: float) -> Sequence[tuple[str, str]]:
        """(id, queue) of the jobs that wait for a worker and whose last hint is old or for another wait."""
        unheard = or_(jobs.c.published_at.is_(None), jobs.c.published_at < now() - republish_seconds)
        waiting = and_(jobs.c.state == "queued", unheard)
        vanished = and_(abandoned(), or_(unheard, jobs.c.published_at < jobs.c.lease_until))
        query = select(jobs.c.id, jobs.c.queue).where(or_(waiting, vanished))
        with self.reading() as conn:
            rows = conn.execute(query.order_by(jobs.c.priority.desc(), jobs.c.number))
            return [(row.id, row.queue) for row in rows]

    def mark_published(self, id: str) -> None:
        with self.engine.begin() as conn:
            conn.execute(update(jobs).where(jobs.c.id == id).values(published_at=now()))

    # What a worker does

    def claim(
        self, owner: str, queues: Sequence[str], lease_seconds: float, only: str | None = None
    ) -> Claim | None:
        """The best free job of these queues (or `only` that one, if it is free), under a new epoch."""
        with self.engine.begin() as conn:
            return take(conn, owner, [*queues], lease_seconds, only, self._max_losses)

    def renew(self, claim: Claim, lease_seconds: float) -> Literal["held", "cancel", "lost"]:
        longer = update(jobs).where(held_by(claim)).values(lease_until=now() + lease_seconds)
        with self.engine.begin() as conn:
            state = conn.execute(longer.returning(jobs.c.state)).scalar()
        return "lost" if state is None else "cancel" if state == "cancelling" else "held"

    def release(self, claim: Claim) -> None:
        """Gives the job back unharmed, for another worker; a job that was to be cancelled is cancelled."""
        with self._fenced(claim) as (conn, job):
            move(conn, job, _without_worker(job), {"reason": "released"})

    def lose(self, claim: Claim) -> None:
        """The runner died of no fault of the job's: counts a loss and queues the job again."""
        with self._fenced(claim) as (conn, job):
            give_back(conn, job, self._max_losses, "runner_lost")

    def enter_stage(self, claim: Claim, stage: Stage) -> None:
        with self._fenced(claim) as (conn, _):
            _touch(conn, claim, stage=stage, progress=None)
            append(conn, claim.job_id, claim.epoch, "stage", {"stage": stage, "status": "started"})

    def commit_stage(self, claim: Claim, stage: Stage, folder: str) -> None:
        """Makes the stage's result the job's, once and for all."""
        row = {"job_id": claim.job_id, "stage": stage, "epoch": claim.epoch, "folder": folder}
        with self._fenced(claim) as (conn, _):
            if stage in _committed(conn, claim.job_id):
                raise Conflict("stage_committed", f"stage {stage} of {claim.job_id} is committed already")
            conn.execute(insert(stages).values(committed_at=now(), **row))
            _touch(conn, claim)
            append(conn, claim.job_id, claim.epoch, "stage", {"stage": stage, "status": "committed"})

    def committed(self, job_id: str) -> dict[str, str]:
        """The folder of each stage that is done."""
        with self.reading() as conn:
            return _committed(conn, job_id)

    def progress(self, claim: Claim, progress: Progress) -> None:
        with self._fenced(claim) as (conn, _):
            _touch(conn, claim, progress=progress.model_dump(mode="json"))

    def event(self, claim: Claim, type: EventType, data: dict[str, Any]) -> None:
        with self._fenced(claim) as (conn, _):
            append(conn, claim.job_id, claim.epoch, type, data)

    def succeed(self, claim: Claim, outcome: Outcome | None) -> None:
        """A diagnosis has no outcome."""
        with self._fenced(claim) as (conn, job):
            move(conn, job, "succeeded", {"outcome": outcome}, outcome=outcome)

    def fail(self, claim: Claim, code: str, message: str, retry: bool) -> None:
        """Ends the job, or queues it again where that may help and has not been tried too often."""
        error = JobError(code=code, message=message).model_dump()
        with self._fenced(claim) as (conn, job):
            failures = job.application_failures + 1
            if not retry or failures >= self._max_failures:
                move(conn, job, "failed", {"error": error}, error=error, application_failures=failures)
            else:
                move(conn, job, _without_worker(job), {"error": error}, application_failures=failures)

    def cancelled(self, claim: Claim) -> None:
        with self._fenced(claim) as (conn, job):
            move(conn, job, "cancelled")

    @contextmanager
    def _fenced(self, claim: Claim) -> Iterator[tuple[Connection, Row[Any]]]:
        with self.engine.begin() as conn:
            yield conn, fence(conn, claim)


def _job(conn: Connection, id: str, lock: bool = False) -> Row[Any]:
    query = select(jobs).where(jobs.c.id == id)
    job = conn.execute(query.with_for_update() if lock else query).first() if JOB_ID.fullmatch(id) else None
    if job is None:
        kind = kind_of(id)
        raise NotFound(f"{kind}_not_found", f"there is no {kind} of this id")
    return job


def _cursor(conn: Connection, after: str) -> int:
    try:
        return int(_job(conn, after).number)
    except NotFound:
        raise BadRequest("invalid_cursor", "`after` must be the next_cursor of an earlier page") from None


def _touch(conn: Connection, claim: Claim, **columns: Any) -> None:
    changed = {"version": jobs.c.version + 1} | columns
    conn.execute(update(jobs).where(jobs.c.id == claim.job_id).values(changed))


def _without_worker(job: Row[Any]) -> State:
    return "cancelled" if job.state == "cancelling" else "queued"


def _committed(conn: Connection, job_id: str) -> dict[str, str]:
    query = select(stages.c.stage, stages.c.folder).where(stages.c.job_id == job_id)
    return {row.stage: row.folder for row in conn.execute(query.order_by(stages.c.committed_at))}


def _recovery(row: Row[Any]) -> Recovery:
    return Recovery(
        id=row.id,
        object="recovery",
        state=row.state,
        stage=row.stage,
        outcome=row.outcome,
        error=row.error and JobError(**row.error),
        progress=row.progress and Progress(**row.progress),
        request=CreateRecovery.model_validate_json(row.request),
        epoch=row.epoch,
        version=row.version,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _event(row: Row[Any]) -> Event:
    return Event(
        object="recovery.event", seq=row.seq, epoch=row.epoch, type=row.type, data=row.data, at=row.at
    )
