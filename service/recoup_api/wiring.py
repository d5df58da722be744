"""What handlers ask for by type: the application's ledger and settings, and the bounds of a page."""

from typing import Annotated

from fastapi import Depends, Query, Request

from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings


async def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


TheLedger = Annotated[Ledger, Depends(_ledger)]
TheSettings = Annotated[Settings, Depends(_settings)]

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=64)]
"""The `next_cursor` of the page before."""
