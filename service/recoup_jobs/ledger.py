"""The ledger: what every job is, was and may become. The row is the truth; messages are hints.

Clients create, read and ask (`verbs.py`). Workers claim (`claims.py`), and then write under
their claim's epoch. Each method is one transaction; each change of state comes with its event
(`history.py`). A worker's writes outlast a database that is away for a moment.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, and_, bindparam, insert, or_, select, update

from recoup.schemas import (
    ChangeRecovery,
    CreateRecovery,
    Event,
    JobError,
    Outcome,
    Page,
    Progress,
    Recovery,
    Stage,
)
from recoup_jobs import tracing, verbs
from recoup_jobs.claims import Claim, abandoned, claim_of, fence, give_back, held_by, take, without_worker
from recoup_jobs.database import connect, migrate, patiently, reader_of
from recoup_jobs.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from recoup_jobs.failures import judge
from recoup_jobs.filters import EVERY, Wanted
from recoup_jobs.group_commit import GroupCommit
from recoup_jobs.history import EventType, append, begin, move
from recoup_jobs.kinds import JOB_ID, PREFIXES, JobKind, kind_of, new_id
from recoup_jobs.pages import page
from recoup_jobs.settings import Settings
from recoup_jobs.tables import DEFAULT_TENANT, events, jobs, leaders, now, stages

PATIENCE_SECONDS = 20.0
"""For how long a worker's write is tried while the database is away; less than a lease by default."""
Held = Literal["held", "cancel", "pause", "lost"]
Also = Callable[[Connection, Recovery], None]
"""What else belongs into the transaction that makes a job."""


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
        self._reader = reader_of(engine)
        self.is_near = engine.dialect.name == "sqlite"
        """A job is read from a file of this machine, in less time than it takes to wake a thread for it."""
        self._together = GroupCommit(engine)
        self._max_failures = max_application_failures
        self._max_losses = max_infrastructure_losses

    def close(self) -> None:
        self.engine.dispose()
        self._reader.dispose()

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection that never waits for a writer."""
        return self._reader.connect()

    # What clients do

    def create(
        self,
        request: CreateRecovery,
        queue: str,
        tenant: str = DEFAULT_TENANT,
        also: Also = lambda *_: None,
        kind: JobKind = "recovery",
    ) -> Recovery:
        """A queued job; what `also` writes is there with it, or neither is."""
        row = {
            "id": new_id(kind),
            "request": request.model_dump_json(),
            "priority": request.priority,
            "queue": queue,
            "tenant": tenant,
            "traceparent": tracing.traceparent(),
        }

        def write(conn: Connection) -> Recovery:
            recovery = _recovery(begin(conn, row), request)
            also(conn, recovery)
            return recovery

        if self.is_near:
            return self._together.run(write)
        with self.engine.begin() as conn:
            return write(conn)

    def get(self, id: str, tenant: str | None = None) -> Recovery:
        """Another tenant's job is as unknown as one that never was; None: anybody's, for a worker."""
        with self.reading() as conn:
            job = _job(conn, id)
        if tenant not in (None, job.tenant):
            raise _unknown(id)
        return _recovery(job)

    def list(
        self,
        after: str | None,
        limit: int,
        wanted: Wanted = EVERY,
        tenant: str = DEFAULT_TENANT,
        kind: JobKind = "recovery",
    ) -> Page[Recovery]:
        """Newest first, from the job that came before `after`."""
        own = jobs.c.tenant == tenant, jobs.c.id.startswith(PREFIXES[kind], autoescape=True)
        query = select(jobs).where(*own, *wanted.conditions())
        query = query.order_by(jobs.c.number.desc()).limit(limit + 1)
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
            found = [as_event(row) for row in conn.execute(query.limit(limit + 1))]
        return page(found, limit, lambda event: str(event.seq))

    # `version`: that the job must still have; a `PreconditionFailed` else.

    def cancel(self, id: str, version: int | None = None) -> Recovery:
        return self._ask(id, verbs.cancel, version)

    def pause(self, id: str, version: int | None = None) -> Recovery:
        return self._ask(id, verbs.pause, version)

    def resume(self, id: str, version: int | None = None) -> Recovery:
        return self._ask(id, verbs.resume, version)

    def change(self, id: str, asked: ChangeRecovery, version: int | None = None) -> Recovery:
        return self._ask(id, lambda conn, job: verbs.change(conn, job, asked), version)

    def retry(self, id: str, also: Also = lambda *_: None) -> Recovery:
        """A new job for one that failed or was cancelled; it takes over what was committed.

        What `also` writes is there with it, or neither is.
        """
        new = new_id(kind_of(id))
        with self.engine.begin() as conn:
            verbs.retry(conn, _job(conn, id, lock=True), new)
            recovery = _recovery(_job(conn, new))
            also(conn, recovery)
            return recovery

    def _ask(self, id: str, verb: Callable[[Connection, Row[Any]], None], version: int | None) -> Recovery:
        with self.engine.begin() as conn:
            job = _job(conn, id, lock=True)
            if version not in (None, job.version):
                message = f"the job is at version {job.version} by now, not {version}; read it again"
                raise PreconditionFailed("precondition_failed", message)
            verb(conn, job)
            return _recovery(_job(conn, id))

    # What the sweeper does

    def lead(self, role: str, owner: str, seconds: float) -> bool:
        """Whether `owner` is the one that does this for so long from now: nobody else is, or no longer."""
        free = or_(leaders.c.owner == owner, leaders.c.until < now())
        elected = update(leaders).where(leaders.c.role == role, free)
        with self.engine.begin() as conn:
            return conn.execute(elected.values(owner=owner, until=now() + seconds)).rowcount == 1

    def resign(self, role: str, owner: str) -> None:
        """Lets another lead at once."""
        mine = update(leaders).where(leaders.c.role == role, leaders.c.owner == owner)
        with self.engine.begin() as conn:
            conn.execute(mine.values(owner=None, until=0.0))

    def take_back(self) -> None:
        """Gives back the jobs whose worker vanished, so that they end or wait for another."""
        with self.reading() as conn:
            ids = conn.execute(select(jobs.c.id).where(abandoned())).scalars().all()
        for id in ids:
            again = select(jobs).where(jobs.c.id == id, abandoned()).with_for_update(skip_locked=True)
            with self.engine.begin() as conn:
                if (job := conn.execute(again).first()) is not None:
                    give_back(conn, job, self._max_losses, "lease_expired")

    def due(self, republish_seconds: float) -> Sequence[tuple[str, str]]:
        """(id, queue) of the jobs that wait for a worker and whose last hint is old or for another wait."""
        unheard = or_(jobs.c.published_at.is_(None), jobs.c.published_at < now() - republish_seconds)
        waiting = and_(jobs.c.state == "queued", unheard)
        vanished = and_(abandoned(), or_(unheard, jobs.c.published_at < jobs.c.lease_until))
        query = select(jobs.c.id, jobs.c.queue).where(or_(waiting, vanished))
        with self.reading() as conn:
            rows = conn.execute(query.order_by(jobs.c.priority.desc(), jobs.c.number))
            return [(row.id, row.queue) for row in rows]

    def traceparent(self, id: str) -> str | None:
        """The trace of the request that made the job."""
        with self.reading() as conn:
            return conn.execute(select(jobs.c.traceparent).where(jobs.c.id == id)).scalar()

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

    def claimed(self, job_id: str, epoch: int) -> Claim:
        """The claim that a supervisor hands to its runner by these two."""
        with self.reading() as conn:
            return claim_of(_job(conn, job_id), epoch)

    def renew(self, claim: Claim, lease_seconds: float) -> Held:
        """Holds the job for longer; answers what its clients ask of it by now."""
        longer = update(jobs).where(held_by(claim)).values(lease_until=now() + lease_seconds)
        with self.engine.begin() as conn:
            job = conn.execute(longer.returning(jobs.c.state, jobs.c.pausing)).first()
        if job is None:
            return "lost"
        if job.state == "cancelling":
            return "cancel"
        return "pause" if job.pausing else "held"

    def pulse(self, job_id: str) -> int:
        """Grows with everything that is written about the job, renewals aside."""
        with self.reading() as conn:
            job = _job(conn, job_id)
            return int(job.version + job.last_seq)

    def release(self, claim: Claim) -> None:
        """Gives the job back unharmed: to nobody or to its end if that was asked, else to another worker."""
        self._fenced(claim, lambda conn, job: move(conn, job, without_worker(job), {"reason": "released"}))

    def lose(self, claim: Claim, reason: str = "runner_lost") -> None:
        """The runner died of no fault of the job's: counts a loss and queues the job again."""
        self._fenced(claim, lambda conn, job: give_back(conn, job, self._max_losses, reason))

    def enter_stage(self, claim: Claim, stage: Stage) -> None:
        def enter(conn: Connection, _: Row[Any]) -> None:
            _touch(conn, claim, stage=stage, progress=None)
            append(conn, claim.job_id, claim.epoch, "stage", {"stage": stage, "status": "started"})

        self._fenced(claim, enter)

    def commit_stage(self, claim: Claim, stage: Stage, folder: str) -> None:
        """Makes the stage's result the job's, once and for all.

        To commit the same folder again changes nothing: the answer to the first try may have been lost.
        """
        row = {"job_id": claim.job_id, "stage": stage, "epoch": claim.epoch, "folder": folder}

        def commit(conn: Connection, _: Row[Any]) -> None:
            committed = _committed(conn, claim.job_id).get(stage)
            if committed == folder:
                return
            if committed is not None:
                raise Conflict("stage_committed", f"stage {stage} of {claim.job_id} is committed already")
            conn.execute(insert(stages).values(committed_at=now(), **row))
            _touch(conn, claim)
            append(conn, claim.job_id, claim.epoch, "stage", {"stage": stage, "status": "committed"})

        self._fenced(claim, commit)

    def committed(self, job_id: str) -> dict[str, str]:
        """The folder of each stage that is done."""
        with self.reading() as conn:
            return _committed(conn, job_id)

    def progress(self, claim: Claim, progress: Progress) -> None:
        point = progress.model_dump(mode="json")
        self._fenced(claim, lambda conn, _: _touch(conn, claim, progress=point))

    def event(self, claim: Claim, type: EventType, data: dict[str, Any]) -> None:
        self._fenced(claim, lambda conn, _: append(conn, claim.job_id, claim.epoch, type, data))

    def succeed(self, claim: Claim, outcome: Outcome | None) -> None:
        """A diagnosis has no outcome."""
        ended = {"outcome": outcome}
        self._fenced(claim, lambda conn, job: move(conn, job, "succeeded", ended, outcome=outcome))

    def fail(self, claim: Claim, code: str, message: str, retry: bool) -> None:
        """Ends the job, or queues it again where that may help and has not been tried too often."""

        def fail(conn: Connection, job: Row[Any]) -> None:
            verdict = judge(job, JobError(code=code, message=message), retry, self._max_failures)
            told = {"error": verdict.error}
            if verdict.again:
                move(conn, job, without_worker(job), told, **verdict.counts)
            else:
                move(conn, job, "failed", told, error=verdict.error, **verdict.counts)

        self._fenced(claim, fail)

    def cancelled(self, claim: Claim) -> None:
        self._fenced(claim, lambda conn, job: move(conn, job, "cancelled"))

    def _fenced(self, claim: Claim, change: Callable[[Connection, Row[Any]], None]) -> None:
        def write() -> None:
            with self.engine.begin() as conn:
                change(conn, fence(conn, claim))

        patiently(write, PATIENCE_SECONDS)


_JOB = select(jobs).where(jobs.c.id == bindparam("id"))
_LOCKED_JOB = _JOB.with_for_update()


def _job(conn: Connection, id: str, lock: bool = False) -> Row[Any]:
    query = _LOCKED_JOB if lock else _JOB
    job = conn.execute(query, {"id": id}).first() if JOB_ID.fullmatch(id) else None
    if job is None:
        raise _unknown(id)
    return job


def _unknown(id: str) -> NotFound:
    kind = kind_of(id)
    return NotFound(f"{kind}_not_found", f"there is no {kind} of this id")


def _cursor(conn: Connection, after: str) -> int:
    try:
        return int(_job(conn, after).number)
    except NotFound:
        raise BadRequest("invalid_cursor", "`after` must be the next_cursor of an earlier page") from None


def _touch(conn: Connection, claim: Claim, **columns: Any) -> None:
    changed = {"version": jobs.c.version + 1} | columns
    conn.execute(update(jobs).where(jobs.c.id == claim.job_id).values(changed))


def _committed(conn: Connection, job_id: str) -> dict[str, str]:
    query = select(stages.c.stage, stages.c.folder).where(stages.c.job_id == job_id)
    return {row.stage: row.folder for row in conn.execute(query.order_by(stages.c.committed_at))}


def _recovery(row: Row[Any], request: CreateRecovery | None = None) -> Recovery:
    """`request`: what the row holds, where that is known."""
    return Recovery(
        id=row.id,
        object="recovery",
        state=row.state,
        stage=row.stage,
        outcome=row.outcome,
        error=row.error and JobError(**row.error),
        progress=row.progress and Progress(**row.progress),
        request=request or _request(row.request),
        pausing=row.pausing,
        retry_of=row.retry_of,
        epoch=row.epoch,
        failures=row.application_failures,
        losses=row.infrastructure_losses,
        version=row.version,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


@lru_cache(maxsize=256)
def _request(text: str) -> CreateRecovery:
    """Who follows a job reads it again and again, and what was asked stays as it was."""
    return CreateRecovery.model_validate_json(text)


def as_event(row: Row[Any]) -> Event:
    return Event(
        object="recovery.event", seq=row.seq, epoch=row.epoch, type=row.type, data=row.data, at=row.at
    )
