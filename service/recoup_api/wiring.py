"""What handlers ask for by type: the application's ledger and settings, who calls, the bounds of a page."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from recoup_api.threads import in_thread
from recoup_api.watch import Watch
from recoup_jobs.deployments import Deployments
from recoup_jobs.errors import Forbidden, NotFound
from recoup_jobs.inspection import Inspections
from recoup_jobs.keys import Caller
from recoup_jobs.kinds import JobKind, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings


async def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _watch(request: Request) -> Watch:
    watch: Watch = request.app.state.watch
    return watch


async def _deployments(request: Request) -> Deployments:
    deployments: Deployments = request.app.state.deployments
    return deployments


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def needs(what: str, how: Literal["read"] | None = None) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a router: its GETs need the scope `<what>:read`, all else `<what>:write` or `how`."""

    async def check(request: Request) -> None:
        _require_scope(request, f"{what}:{how or _how(request)}")

    return check


def for_jobs(kind: JobKind) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a router: whatever a route does with a job, it is the caller's, and of this kind.

    The job is left in `request.state.job`. One dependency does it all, because each costs a request as much
    as a statement of SQL.
    """

    async def check(request: Request) -> None:
        _require_scope(request, f"jobs:{_how(request)}")
        id = request.path_params.get("id")
        if id is None:
            return
        if kind_of(id) != kind:
            raise NotFound(f"{kind}_not_found", f"there is no {kind} of this id")
        ledger: Ledger = request.app.state.ledger
        tenant = request.state.caller.tenant
        near = ledger.is_near
        request.state.job = ledger.get(id, tenant) if near else await in_thread(ledger.get, id, tenant)

    return check


def _how(request: Request) -> str:
    return "read" if request.method == "GET" else "write"


def _require_scope(request: Request, scope: str) -> None:
    if scope not in request.state.caller.scopes:
        raise Forbidden("insufficient_scope", f"this key lacks the scope {scope}")


async def _inspections(request: Request) -> Inspections:
    inspections: Inspections = request.app.state.inspections
    return inspections


TheLedger = Annotated[Ledger, Depends(_ledger)]
TheSettings = Annotated[Settings, Depends(_settings)]
TheWatch = Annotated[Watch, Depends(_watch)]
TheDeployments = Annotated[Deployments, Depends(_deployments)]
TheCaller = Annotated[Caller, Depends(_caller)]
TheInspections = Annotated[Inspections, Depends(_inspections)]


Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=200)]
"""The `next_cursor` of the page before."""
