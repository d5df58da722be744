"""`recoup-server keys create | list | revoke`: who may call this installation."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recoup_jobs.settings import Settings

if TYPE_CHECKING:
    from recoup_jobs.ledger import Ledger

DAY = 86_400.0

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

Home = Annotated[
    Path | None, typer.Option(help="Where everything is kept. [default: RECOUP_HOME or ~/.recoup]")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whom it is for; only people read this.")],
    tenant: Annotated[str, typer.Option(help="Whose recoveries and files it sees.")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="Such as jobs:read. [default: all but metrics:read]")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="It expires after so many.")] = None,
    home: Home = None,
) -> None:
    """Make a key and print it; it cannot be shown again."""
    from recoup_jobs.keys import READ_METRICS, SCOPES, NewKey, create_key

    known = *SCOPES, READ_METRICS
    if unknown := sorted(set(scope or ()) - set(known)):
        typer.echo(f"There is no scope {unknown[0]}; there are {', '.join(known)}.", err=True)
        sys.exit(2)
    expires_at = time.time() + days * DAY if days else None
    with _ledger(home) as ledger:
        typer.echo(create_key(ledger, NewKey(tenant[:64], name[:64], tuple(scope or SCOPES), expires_at)))


@app.command(name="list")
def list_(home: Home = None) -> None:
    """Show all keys, without their secrets."""
    from recoup_jobs.keys import list_keys

    with _ledger(home) as ledger:
        for row in list_keys(ledger):
            over = row.expires_at is not None and row.expires_at < time.time()
            state = "revoked" if row.revoked_at else "expired" if over else "live"
            typer.echo(f"{row.prefix}  {state:8}  {row.tenant}  {row.name}  {','.join(row.scopes)}")


@app.command()
def revoke(prefix: str, home: Home = None) -> None:
    """End a key, by the prefix that `list` shows."""
    from recoup_jobs.errors import NotFound
    from recoup_jobs.keys import revoke_key

    try:
        with _ledger(home) as ledger:
            revoke_key(ledger, prefix)
    except NotFound as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@contextmanager
def _ledger(home: Path | None) -> Iterator["Ledger"]:
    from recoup_jobs.ledger import open_ledger

    ledger = open_ledger(Settings(home=home) if home else Settings())
    try:
        yield ledger
    finally:
        ledger.close()
