"""What handlers ask for by type: the application's ledger and settings, and the bounds of a page."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Query, Request

from recoup_jobs.errors import NotFound
from recoup_jobs.kinds import PREFIXES, JobKind, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings


async def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def of_kind(kind: JobKind) -> Callable[[Request], Awaitable[None]]:
    """What refuses ids of other kinds of jobs below a path."""

    async def check(request: Request) -> None:
        if kind_of(request.path_params.get("id", PREFIXES[kind])) != kind:
            raise NotFound(f"{kind}_not_found", f"there is no {kind} of this id")

    return check


TheLedger = Annotated[Ledger, Depends(_ledger)]
TheSettings = Annotated[Settings, Depends(_settings)]

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=64)]
"""The `next_cursor` of the page before."""
