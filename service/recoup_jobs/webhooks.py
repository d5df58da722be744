"""The rows of webhooks, and their secrets, which stand in no row.

A secret is derived from the installation's own and the webhook's id, so that a copy of the database signs
nothing.
"""

import base64
import hmac
import re
import secrets
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from recoup.schemas import ProblemItem
from recoup.schemas.webhook import CreateWebhook, NewWebhook, Webhook
from recoup_jobs.errors import NotFound, Unprocessable
from recoup_jobs.ledger import Ledger
from recoup_jobs.public_https import Blocked, Resolve, require_public
from recoup_jobs.tables import deliveries, now, webhooks

WEBHOOK_ID = re.compile(r"wh_[0-9a-f]{24}")
MOST = 20
"""Of one tenant."""


def add(ledger: Ledger, asked: CreateWebhook, tenant: str, secret: bytes, resolve: Resolve) -> NewWebhook:
    """Raises `Unprocessable` for a URL that leads to no public host."""
    _require_public(asked.url, resolve)
    id = f"wh_{secrets.token_hex(12)}"
    row = {"id": id, "tenant": tenant, "url": asked.url, "events": [*dict.fromkeys(asked.events)]}
    with ledger.engine.begin() as conn:
        if len(conn.execute(select(webhooks.c.id).where(webhooks.c.tenant == tenant)).all()) >= MOST:
            raise Unprocessable("too_many_webhooks", f"a tenant may have {MOST} webhooks; delete one")
        conn.execute(insert(webhooks).values(created_at=now(), **row))
        made = _webhook(_row(conn, id, tenant))
    return NewWebhook(**made.model_dump(), secret=secret_of(id, secret))


def get(ledger: Ledger, id: str, tenant: str) -> Webhook:
    with ledger.reading() as conn:
        return _webhook(_row(conn, id, tenant))


def find(ledger: Ledger, tenant: str) -> list[Webhook]:
    """Oldest first."""
    query = select(webhooks).where(webhooks.c.tenant == tenant).order_by(webhooks.c.created_at)
    with ledger.reading() as conn:
        return [_webhook(row) for row in conn.execute(query)]


def remove(ledger: Ledger, id: str, tenant: str) -> None:
    with ledger.engine.begin() as conn:
        _row(conn, id, tenant)
        conn.execute(delete(deliveries).where(deliveries.c.webhook_id == id))
        conn.execute(delete(webhooks).where(webhooks.c.id == id))


def secret_of(id: str, secret: bytes) -> str:
    derived = hmac.new(secret, f"webhook {id}".encode(), "sha256").digest()
    return f"whsec_{base64.b64encode(derived).decode()}"


def signature(id: str, secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks, version 1."""
    key = base64.b64decode(secret_of(id, secret).removeprefix("whsec_"))
    signed = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, "sha256").digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def _require_public(url: str, resolve: Resolve) -> None:
    try:
        require_public(url, resolve)
    except Blocked as blocked:
        message = str(blocked)
    except (OSError, UnicodeError):
        message = "the host's name resolves to no address"
    else:
        return
    item = ProblemItem(pointer="/url", code="invalid_webhook_url", message=message)
    raise Unprocessable(item.code, f"/url: {message}", [item])


def _row(conn: Connection, id: str, tenant: str) -> Row[Any]:
    own = select(webhooks).where(webhooks.c.id == id, webhooks.c.tenant == tenant)
    row = conn.execute(own).first() if WEBHOOK_ID.fullmatch(id) else None
    if row is None:
        raise NotFound("webhook_not_found", "there is no webhook of this id")
    return row


def _webhook(row: Row[Any]) -> Webhook:
    return Webhook(
        id=row.id,
        object="webhook",
        url=row.url,
        events=row.events,
        created_at=row.created_at,
        disabled_at=row.disabled_at,
    )
