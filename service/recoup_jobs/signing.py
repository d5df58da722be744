"""The installation's secret, with which it knows its own cursors again.

From `RECOUP_SECRET`, which processes on several hosts must share; else from a file below `home` that is made
when it is first needed and that only this user can read.
"""

import hmac
import os
import secrets
import tempfile
from pathlib import Path

from recoup_jobs.settings import Settings


def installation_secret(settings: Settings) -> bytes:
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()
    place = settings.home / "secret"
    if not place.exists():
        _make(place)
    return place.read_bytes()


def sign(secret: bytes, *parts: str) -> str:
    """Of the parts in their order, none of which runs into the next."""
    message = b"".join(len(part.encode()).to_bytes(4) + part.encode() for part in parts)
    return hmac.new(secret, message, "sha256").hexdigest()[:32]


def _make(place: Path) -> None:
    """Whole or not at all, and by one process alone."""
    descriptor, aside = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(descriptor, "w") as out:
        out.write(secrets.token_hex(32))
    try:
        os.link(aside, place)
    except FileExistsError:
        pass
    finally:
        Path(aside).unlink()
