"""What handlers ask for by type: the application's ledger and settings, who calls, the bounds of a page."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from recoup_api.watch import Watch
from recoup_jobs.deployments import Deployments
from recoup_jobs.errors import Forbidden, NotFound
from recoup_jobs.inspection import Inspections
from recoup_jobs.keys import Caller
from recoup_jobs.kinds import PREFIXES, JobKind, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.tenancy import require_own_job


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
        scope = f"{what}:{how or ('read' if request.method == 'GET' else 'write')}"
        if scope not in request.state.caller.scopes:
            raise Forbidden("insufficient_scope", f"this key lacks the scope {scope}")

    return check


async def _inspections(request: Request) -> Inspections:
    inspections: Inspections = request.app.state.inspections
    return inspections


TheLedger = Annotated[Ledger, Depends(_ledger)]
TheSettings = Annotated[Settings, Depends(_settings)]
TheWatch = Annotated[Watch, Depends(_watch)]
TheDeployments = Annotated[Deployments, Depends(_deployments)]
TheCaller = Annotated[Caller, Depends(_caller)]
TheInspections = Annotated[Inspections, Depends(_inspections)]


def own_job(request: Request, ledger: TheLedger, caller: TheCaller) -> None:
    """Whatever a route does with a job, it is the caller's."""
    if "id" in request.path_params:
        require_own_job(ledger, request.path_params["id"], caller.tenant)


Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=200)]
"""The `next_cursor` of the page before."""
