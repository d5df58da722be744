"""`recoup doctor`: is there a server, is it well, may this key use it, do the versions fit?

Each check needs the one before it; the first that fails says what to do, and is the last.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import typer
from rich.text import Text

from recoup import __version__, errors
from recoup._render import clean
from recoup._session import Json, advice, console, echo, exit_code

if TYPE_CHECKING:
    from recoup.client import Client


class Finding(NamedTuple):
    """What one check found."""

    check: str
    ok: bool
    detail: str
    exit_code: int = 0


def doctor(json: Json = False) -> None:
    """Check the server, the key and the versions; say what to do about what is wrong."""
    findings = [*_findings()]
    if json:
        echo([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else "FAIL"
            console().print(Text(f"{mark} {finding.check}: {clean(finding.detail)}"), soft_wrap=True)
    raise typer.Exit(max(finding.exit_code for finding in findings))


def _findings() -> Iterator[Finding]:
    from recoup.client import Client

    check = "address"
    try:
        with Client(timeout=10.0, max_retries=0) as client:
            yield Finding(check, True, client.base_url)
            for check, ask in CHECKS.items():
                yield Finding(check, True, ask(client))
    except errors.RecoupError as error:
        words = [str(error), advice(error) or ""]
        yield Finding(check, False, " ".join(words).strip(), exit_code(error))


def _ready(client: "Client") -> str:
    client.ready()
    return "it is ready to work"


def _key(client: "Client") -> str:
    next(client.recoveries.list(limit=1), None)
    return "the recoveries may be read"


def _versions(client: "Client") -> str:
    server = client.capabilities().version
    if server.split(".")[:2] != __version__.split(".")[:2]:
        raise errors.RecoupError(
            f"The server is of version {server}, this client of {__version__}: install the one that fits."
        )
    return f"server {server}, client {__version__}"


def _models(client: "Client") -> str:
    models = client.capabilities().models
    return f"{len(models)} below the model roots: {', '.join(models[:10]) or 'none yet'}"


CHECKS = {"server": _ready, "key": _key, "versions": _versions, "models": _models}
"""In this order; each needs the one before it."""
