"""API keys: who may call, for which tenant, and what with.

A key is `recoup_<prefix>_<secret>`. The row keeps the prefix, by which it is found, and the SHA-256 of the
whole: a secret of 256 random bits needs no slow hash. It is shown once, when it is made. Keys are revoked,
never deleted, so that an installation that had one never becomes open again.
"""

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Row, insert, select, update

from recoup_jobs.errors import NotFound, Unauthorized
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import DEFAULT_TENANT, api_keys, now

KEY = re.compile(r"recoup_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
SCOPES = tuple(
    f"{what}:{how}" for what in ("jobs", "files", "models", "webhooks") for how in ("read", "write")
)
READ_METRICS = "metrics:read"
"""Shows what all tenants do together, so no key has it that was not made for it."""
REMEMBERED_SECONDS = 2.0
"""For so long a key that was revoked may still be let in."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    tenant: str
    scopes: frozenset[str]
    key: str | None
    """The prefix of the key; None where none is asked for."""


OPERATOR = Caller(DEFAULT_TENANT, frozenset({*SCOPES, READ_METRICS}), None)
"""Who holds the key of the settings."""
VISITOR = replace(OPERATOR)
"""Whoever sits at this machine, while there is no key."""


@dataclass(frozen=True)
class NewKey:
    tenant: str
    name: str
    scopes: tuple[str, ...] = SCOPES
    expires_at: float | None = None
    """Unix seconds."""


def create_key(ledger: Ledger, new: NewKey) -> str:
    """The key, which nobody can read again."""
    prefix = secrets.token_hex(6)
    key = f"recoup_{prefix}_{secrets.token_urlsafe(32)}"
    row = {"prefix": prefix, "sha256": _digest(key), **vars(new), "scopes": [*new.scopes]}
    with ledger.engine.begin() as conn:
        conn.execute(insert(api_keys).values(created_at=now(), **row))
    return key


def list_keys(ledger: Ledger) -> Sequence[Row[Any]]:
    """Oldest first; rows hold no secret."""
    shown = [column for column in api_keys.c if column.name != "sha256"]
    with ledger.reading() as conn:
        return conn.execute(select(*shown).order_by(api_keys.c.created_at)).all()


def revoke_key(ledger: Ledger, prefix: str) -> None:
    ended = update(api_keys).where(api_keys.c.prefix == prefix, api_keys.c.revoked_at.is_(None))
    with ledger.engine.begin() as conn:
        if not conn.execute(ended.values(revoked_at=now())).rowcount:
            raise NotFound("key_not_found", f"there is no key {prefix} that could be revoked")


def any_key(ledger: Ledger) -> bool:
    with ledger.reading() as conn:
        return conn.execute(select(api_keys.c.prefix).limit(1)).first() is not None


class Keyring:
    """Answers who holds a key, from memory where it was asked a moment ago."""

    def __init__(
        self, ledger: Ledger, own: SecretStr | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._own = None if own is None else _digest(own.get_secret_value())
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Caller, float]] = {}
        self._is_open, self._open_until = own is None, 0.0

    def remembered(self, key: str | None) -> Caller | None:
        """The caller, if that can be told without the database."""
        if key is None:
            return VISITOR if self._is_open and self._clock() < self._open_until else None
        digest = _digest(key)
        if self._is_own(digest):
            return OPERATOR
        caller, until = self._known.get(digest, (None, 0.0))
        return caller if self._clock() < until else None

    def admit(self, key: str | None) -> Caller:
        """Whose key it is; while there is none, anybody's, with whatever key a client cannot leave out.

        Raises `Unauthorized`, in the same words whatever is wrong with the key.
        """
        caller = (None if key is None else self._holder(key)) or self._open()
        if caller is None:
            raise Unauthorized("unauthorized", "send a key of this server as `Authorization: Bearer <key>`")
        return caller

    def _open(self) -> Caller | None:
        if self._is_open:
            self._is_open, self._open_until = not any_key(self._ledger), self._clock() + REMEMBERED_SECONDS
        return VISITOR if self._is_open else None

    def _holder(self, key: str) -> Caller | None:
        digest = _digest(key)
        if self._is_own(digest):
            return OPERATOR
        caller = self._stored(key, digest)
        if caller is not None:
            with self._lock:
                self._known = {d: known for d, known in self._known.items() if known[1] > self._clock()}
                self._known[digest] = caller, self._clock() + REMEMBERED_SECONDS
        return caller

    def _is_own(self, digest: str) -> bool:
        return self._own is not None and hmac.compare_digest(digest, self._own)

    def _stored(self, key: str, digest: str) -> Caller | None:
        shape = KEY.fullmatch(key)
        usable = (api_keys.c.expires_at.is_(None)) | (api_keys.c.expires_at > now())
        query = select(api_keys, (usable & api_keys.c.revoked_at.is_(None)).label("usable"))
        with self._ledger.reading() as conn:
            row = conn.execute(query.where(api_keys.c.prefix == (shape.group(1) if shape else ""))).first()
        same = hmac.compare_digest(digest, row.sha256 if row else "0" * 64)
        return Caller(row.tenant, frozenset(row.scopes), row.prefix) if row and same and row.usable else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
