"""The rows of deployments: what is wanted in service, and what the servers were last seen to do.

The row says what is *wanted*; `placements` say what *is*, a row for each server. Clients change what is
wanted, the reconciler (`reconciler.py`) makes it so and notes it. A name belongs to the one deployment of
its tenant that is live: a newer one takes it over in the transaction that makes it live, so that there is
no moment without, and the older one is kept for a rollback.
"""

import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from recoup.schemas import Deployment, DeploymentState, JobError, Launch, Lineage, Page, ReplicaStanding
from recoup.schemas.deployment import DeploymentKind, ReplicaState
from recoup_jobs.errors import BadRequest, Conflict, NotFound, TooMany
from recoup_jobs.ledger import Ledger
from recoup_jobs.pages import page
from recoup_jobs.rollout import WANTED, check
from recoup_jobs.tables import deployments, now, placements

DEPLOYMENT_ID = re.compile(r"dep_[0-9a-f]{24}")
LATER_SECONDS = 60


@dataclass(frozen=True)
class NewDeployment:
    """What is known of a deployment before there is one."""

    id: str
    tenant: str
    name: str
    kind: DeploymentKind
    lineage: Lineage
    launch: Launch


@dataclass(frozen=True)
class Placed:
    """What was found on one server."""

    replica: str
    """Its URL."""
    state: ReplicaState
    reason: JobError | None = None


def new_id() -> str:
    return f"dep_{secrets.token_hex(12)}"


Also = Callable[[Connection, Deployment], None]
"""What else belongs into the transaction that creates."""


class Deployments:
    """The deployments of an installation, whose servers are `replicas` (URLs, in their order)."""

    def __init__(self, ledger: Ledger, replicas: Sequence[str]) -> None:
        self._ledger = ledger
        self._replicas = list(replicas)

    # What clients do

    def add(self, new: NewDeployment, most: int, also: Also = lambda *_: None) -> Deployment:
        """A pending deployment; raises `TooMany` where `most` of the tenant's are wanted already."""
        row = {
            "id": new.id,
            "tenant": new.tenant,
            "name": new.name,
            "kind": new.kind,
            "state": "pending",
            "recovery_id": new.lineage.recovery,
            "lineage": new.lineage.model_dump(),
            "launch": new.launch.model_dump(),
            "version": 1,
        }
        mine = select(func.count()).where(deployments.c.tenant == new.tenant, deployments.c.state.in_(WANTED))
        with self._ledger.engine.begin() as conn:
            if conn.execute(mine).scalar_one() >= most:
                message = f"{most} deployments are in service or on their way; withdraw one"
                raise TooMany("quota_exceeded", message, LATER_SECONDS)
            conn.execute(insert(deployments).values(created_at=now(), **row))
            made = self._read(conn, new.id)
            also(conn, made)
            return made

    def get(self, id: str, tenant: str) -> Deployment:
        with self._ledger.reading() as conn:
            return self._shown(conn, [_row(conn, id, tenant)])[0]

    def find(
        self, tenant: str, after: str | None, limit: int, state: DeploymentState | None = None
    ) -> Page[Deployment]:
        """Newest first."""
        query = select(deployments).where(deployments.c.tenant == tenant)
        if state is not None:
            query = query.where(deployments.c.state == state)
        with self._ledger.reading() as conn:
            if after is not None:
                query = query.where(deployments.c.number < _cursor(conn, after, tenant))
            rows = conn.execute(query.order_by(deployments.c.number.desc()).limit(limit + 1)).all()
            return page(self._shown(conn, rows), limit, lambda deployment: deployment.id)

    def withdraw(self, id: str, tenant: str) -> Deployment:
        """Takes it out of service; once more changes nothing."""
        with self._ledger.engine.begin() as conn:
            row = _row(conn, id, tenant, lock=True)
            if row.state != "withdrawn":
                _move(conn, row, "withdrawn", ended_at=now())
            return self._read(conn, id)

    def roll_back(self, id: str, tenant: str) -> Deployment:
        """Wants the deployment back that had the name before this one, which serves until that is live."""
        with self._ledger.engine.begin() as conn:
            row = _row(conn, id, tenant, lock=True)
            if row.state != "live":
                raise Conflict(
                    "illegal_transition", f"the deployment is {row.state}; rollback is for one that is live"
                )
            before = conn.execute(
                select(deployments)
                .where(
                    *_same_name(row), deployments.c.state == "superseded", deployments.c.number < row.number
                )
                .order_by(deployments.c.number.desc())
                .limit(1)
                .with_for_update()
            ).first()
            if before is None:
                raise Conflict("nothing_to_roll_back_to", f"no earlier deployment had the name {row.name}")
            _move(conn, before, "pending", ended_at=None)
            return self._read(conn, before.id)

    # What the reconciler does

    def wanted(self) -> list[Deployment]:
        """Of all tenants, oldest first."""
        query = select(deployments).where(deployments.c.state.in_(WANTED)).order_by(deployments.c.number)
        with self._ledger.reading() as conn:
            return self._shown(conn, conn.execute(query).all())

    def ended(self, seconds: float) -> list[tuple[str, str]]:
        """(id, server) of those that ended so long ago, and that the server may still have."""
        gone = deployments.c.ended_at < now() - seconds, deployments.c.state.not_in(WANTED)
        query = select(deployments.c.id, placements.c.replica).join(placements).where(*gone)
        with self._ledger.reading() as conn:
            return [(row.id, row.replica) for row in conn.execute(query)]

    def over(self, ids: Collection[str], seconds: float) -> list[str]:
        """Those of `ids` that ended so long ago and stand on no server."""
        if not ids:
            return []
        gone = deployments.c.ended_at < now() - seconds, deployments.c.state.not_in(WANTED)
        stands = deployments.c.id.in_(select(placements.c.deployment_id))
        query = select(deployments.c.id).where(deployments.c.id.in_(ids), *gone, ~stands)
        with self._ledger.reading() as conn:
            return [*conn.execute(query).scalars()]

    def placed(self, id: str) -> list[str]:
        """The servers on which it stands."""
        query = select(placements.c.replica).where(placements.c.deployment_id == id)
        with self._ledger.reading() as conn:
            return [*conn.execute(query).scalars()]

    def place(self, id: str, placed: Placed) -> None:
        """Notes what was found on a server."""
        values = {"state": placed.state, "reason": placed.reason and placed.reason.model_dump()}
        key = placements.c.deployment_id == id, placements.c.replica == placed.replica
        with self._ledger.engine.begin() as conn:
            known = conn.execute(update(placements).where(*key).values(checked_at=now(), **values))
            if not known.rowcount:
                fresh = {"deployment_id": id, "replica": placed.replica, "checked_at": now()}
                conn.execute(insert(placements).values(**fresh, **values))

    def remove(self, id: str, replica: str) -> None:
        """Notes that a server has it no more."""
        key = placements.c.deployment_id == id, placements.c.replica == replica
        with self._ledger.engine.begin() as conn:
            conn.execute(delete(placements).where(*key))

    def move(self, id: str, state: DeploymentState, reason: JobError | None = None) -> None:
        """Takes the step, unless somebody else took another one meanwhile that forbids it."""
        with self._ledger.engine.begin() as conn:
            row = conn.execute(select(deployments).where(deployments.c.id == id).with_for_update()).one()
            if row.state not in WANTED or (row.state, row.reason) == (state, reason and reason.model_dump()):
                return
            if state == "live":
                _take_name(conn, row)
            ended = {"ended_at": now()} if state == "failed" else {}
            _move(conn, row, state, reason, **ended)

    # What the gateway asks

    def serving(self, tenant: str) -> list[Deployment]:
        """Those that are live, by name."""
        live = deployments.c.tenant == tenant, deployments.c.state == "live"
        with self._ledger.reading() as conn:
            rows = conn.execute(select(deployments).where(*live).order_by(deployments.c.name)).all()
            return self._shown(conn, rows)

    def _read(self, conn: Connection, id: str) -> Deployment:
        row = conn.execute(select(deployments).where(deployments.c.id == id)).one()
        return self._shown(conn, [row])[0]

    def _shown(self, conn: Connection, rows: Sequence[Row[Any]]) -> list[Deployment]:
        ids = [row.id for row in rows]
        query = select(placements).where(placements.c.deployment_id.in_(ids))
        found: dict[str, list[ReplicaStanding]] = {id: [] for id in ids}
        for placed in conn.execute(query) if ids else ():
            if placed.replica in self._replicas:
                found[placed.deployment_id].append(self._standing(placed))
        return [_deployment(row, sorted(found[row.id], key=lambda one: one.replica)) for row in rows]

    def _standing(self, row: Row[Any]) -> ReplicaStanding:
        return ReplicaStanding(
            replica=self._replicas.index(row.replica),
            state=row.state,
            reason=row.reason and JobError(**row.reason),
            checked_at=row.checked_at,
        )


def _row(conn: Connection, id: str, tenant: str, lock: bool = False) -> Row[Any]:
    own = select(deployments).where(deployments.c.id == id, deployments.c.tenant == tenant)
    query = own.with_for_update() if lock else own
    row = conn.execute(query).first() if DEPLOYMENT_ID.fullmatch(id) else None
    if row is None:
        raise NotFound("deployment_not_found", "there is no deployment of this id")
    return row


def _cursor(conn: Connection, after: str, tenant: str) -> int:
    try:
        return int(_row(conn, after, tenant).number)
    except NotFound:
        raise BadRequest("invalid_cursor", "`after` must be the next_cursor of an earlier page") from None


def _same_name(row: Row[Any]) -> tuple[Any, ...]:
    return deployments.c.tenant == row.tenant, deployments.c.name == row.name


def _take_name(conn: Connection, row: Row[Any]) -> None:
    """From whoever has it, unless this one does."""
    holder = (*_same_name(row), deployments.c.state == "live", deployments.c.id != row.id)
    for before in conn.execute(select(deployments).where(*holder).with_for_update()).all():
        _move(conn, before, "superseded", ended_at=now())


def _move(
    conn: Connection, row: Row[Any], state: DeploymentState, reason: JobError | None = None, **columns: Any
) -> None:
    if state != row.state:
        check(row.state, state)
    if state == "live" and row.state != "live":
        columns |= {"live_at": now()}
    values = {"state": state, "reason": reason and reason.model_dump(), "version": row.version + 1}
    conn.execute(update(deployments).where(deployments.c.id == row.id).values(**values, **columns))


def _deployment(row: Row[Any], standings: list[ReplicaStanding]) -> Deployment:
    return Deployment(
        id=row.id,
        object="deployment",
        name=row.name,
        kind=row.kind,
        state=row.state,
        reason=row.reason and JobError(**row.reason),
        lineage=Lineage(**row.lineage),
        replicas=standings,
        launch=Launch(**row.launch),
        version=row.version,
        created_at=row.created_at,
        live_at=row.live_at,
        ended_at=row.ended_at,
    )
