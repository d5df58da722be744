"""Tells webhooks that recoveries have ended: `deliver`, which a sweeper calls again and again.

What is to be told is read from the ledger, never handed over: a recovery that ended has a delivery for each
webhook of its tenant, made by the first sweep that sees it. A delivery is taken by moving its next attempt
into the future, so that several sweepers send it once; one that dies in between sends it again. Receivers
know a repetition by `webhook-id`.
"""

import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, literal, null, select, update
from sqlalchemy.exc import IntegrityError

from recoup.schemas.recovery import TERMINAL_STATES
from recoup_jobs.ledger import Ledger
from recoup_jobs.public_https import Blocked, Resolve, addresses_of, post, require_public
from recoup_jobs.tables import deliveries, jobs, now, webhooks
from recoup_jobs.webhooks import signature

BACKOFF_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""After each failed attempt; after the last one nothing more is tried."""
TOLD_FOR_SECONDS = 5 * 86_400.0
"""Recoveries that ended before that are not told any more."""
TAKEN_SECONDS = 60.0
AT_ONCE = 20
GONE = 410

NOT_ASKED_FOR = "not asked for"
JOB = (jobs.c.state, jobs.c.outcome, jobs.c.finished_at)

Send = Callable[[str, bytes, Mapping[str, str]], int]
"""`send(url, body, headers)` answers the status; raises `Blocked`, `OSError` or `HTTPException`."""


def deliver(ledger: Ledger, secret: bytes, send: Send | None = None) -> int:
    """Sends what is due, a few at a time; returns how many were tried. `secret` is the installation's."""
    with suppress(IntegrityError), ledger.engine.begin() as conn:  # another sweeper enlists the same
        _enlist(conn)
    with ledger.engine.begin() as conn:
        due = _take(conn)
    for delivery in due:
        answer = _attempt(delivery, secret, send or https_sender())
        with ledger.engine.begin() as conn:
            _note(conn, delivery, answer)
    return len(due)


def https_sender(resolve: Resolve = addresses_of) -> Send:
    tls = ssl.create_default_context()

    def send(url: str, body: bytes, headers: Mapping[str, str]) -> int:
        return post(url, body, headers, require_public(url, resolve)[0], tls)

    return send


def _enlist(conn: Connection) -> None:
    """A delivery for each recovery that ended since its webhook was made, and has none."""
    ended = and_(jobs.c.state.in_(TERMINAL_STATES), jobs.c.finished_at > now() - TOLD_FOR_SECONDS)
    known = select(deliveries.c.job_id).where(
        deliveries.c.webhook_id == webhooks.c.id,
        deliveries.c.job_id == jobs.c.id,
        deliveries.c.seq == jobs.c.last_seq,
    )
    wanted = (
        select(webhooks.c.id, jobs.c.id, jobs.c.last_seq, literal(0), now())
        .join(jobs, and_(jobs.c.tenant == webhooks.c.tenant, jobs.c.finished_at > webhooks.c.created_at))
        .where(ended, webhooks.c.disabled_at.is_(None), ~known.exists())
    )
    columns = ["webhook_id", "job_id", "seq", "attempts", "next_at"]
    conn.execute(insert(deliveries).from_select(columns, wanted))


def _take(conn: Connection) -> list[Row[Any]]:
    due = (
        select(
            deliveries, webhooks.c.url, webhooks.c.events, jobs.c.state, jobs.c.outcome, jobs.c.finished_at
        )
        .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
        .join(jobs, jobs.c.id == deliveries.c.job_id)
        .where(deliveries.c.next_at <= now())
        .order_by(deliveries.c.next_at)
        .limit(AT_ONCE)
        .with_for_update(of=deliveries, skip_locked=True)
    )
    taken = list(conn.execute(due))
    for delivery in taken:
        conn.execute(_this(delivery).values(next_at=now() + TAKEN_SECONDS))
    return taken


def _attempt(delivery: Row[Any], secret: bytes, send: Send) -> int | str:
    """The status, or why there is none."""
    kind = f"recovery.{delivery.state}"
    if kind not in delivery.events:
        return NOT_ASKED_FOR
    id = message_id(delivery)
    told = {"id": delivery.job_id, "state": delivery.state, "outcome": delivery.outcome}
    at = int(delivery.finished_at)
    body = json.dumps({"object": "event", "id": id, "type": kind, "created_at": at, "data": told}).encode()
    timestamp = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "recoup-webhooks",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(delivery.webhook_id, secret, id, timestamp, body),
    }
    try:
        return send(delivery.url, body, headers)
    except Blocked:
        return "blocked"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def message_id(delivery: Row[Any]) -> str:
    """The same for each attempt."""
    what = f"{delivery.webhook_id} {delivery.job_id} {delivery.seq}"
    return f"msg_{hashlib.sha256(what.encode()).hexdigest()[:24]}"


def _note(conn: Connection, delivery: Row[Any], answer: int | str) -> None:
    attempts = delivery.attempts + 1
    arrived = isinstance(answer, int) and 200 <= answer < 300
    over = arrived or answer in {NOT_ASKED_FOR, GONE} or attempts > len(BACKOFF_SECONDS)
    next_at = null() if over else now() + BACKOFF_SECONDS[attempts - 1]
    conn.execute(_this(delivery).values(attempts=attempts, last_answer=str(answer)[:64], next_at=next_at))
    if answer == GONE:
        conn.execute(update(webhooks).where(webhooks.c.id == delivery.webhook_id).values(disabled_at=now()))


def _this(delivery: Row[Any]) -> Any:
    return update(deliveries).where(
        deliveries.c.webhook_id == delivery.webhook_id,
        deliveries.c.job_id == delivery.job_id,
        deliveries.c.seq == delivery.seq,
    )
