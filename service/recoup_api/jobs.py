"""What a recovery and a diagnosis have in common over HTTP: to be listed, read, steered and followed.

`add_to(router, kind)` gives a router these routes. `Kind.listed` makes of the ledger's job what clients of
this kind get, and `Kind.detailed` the same with what lies in files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from recoup.schemas import Alignment, ChangeRecovery, Damage, Event, Outcome, Page, Recovery, State
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_api.body import ChangeBody, documented
from recoup_api.cursors import seal, unseal
from recoup_api.downloads import Download
from recoup_api.examples import CHANGE
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.query import METADATA_PARAMETER, MetadataWanted
from recoup_api.threads import in_thread
from recoup_api.watch import etag, known_etags
from recoup_api.wiring import After, Limit, TheCaller, TheLedger, TheSettings, TheWatch
from recoup_jobs.answers import Answer
from recoup_jobs.artifacts import Published, open_artifact, open_published
from recoup_jobs.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from recoup_jobs.filters import Wanted
from recoup_jobs.kinds import JobKind, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store

J = TypeVar("J", bound=BaseModel)

# A report shows what models wrote; whatever a browser makes of it, it is not this server's own page.
NOT_OUR_PAGE = {"Content-Security-Policy": "sandbox allow-scripts", "X-Content-Type-Options": "nosniff"}
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
PICTURES = {"text/csv": "csv", "image/svg+xml": "svg", "image/png": "png"}
"""As what an alignment comes beside JSON."""
ByAccept = Annotated[str, Header()]
IfMatch = Annotated[str | None, Header(max_length=1000)]
"""Refuses the verb with 412 unless the job still has this ETag."""


@dataclass(frozen=True)
class Kind(Generic[J]):
    name: JobKind
    path: str
    model: type[J]
    page: Any
    """The model of a page of them."""
    listed: Callable[[Recovery], J]
    detailed: Callable[[Recovery, Ledger, Settings], J] | None = None
    """With what lies in files, where there is such."""

    def shown(self, job: Recovery, ledger: Ledger, settings: Settings) -> J:
        return self.listed(job) if self.detailed is None else self.detailed(job, ledger, settings)

    def accepted(self, job: Recovery) -> Answer:
        """To a request that made this job."""
        headers = {"Location": f"{self.path}/{job.id}", "ETag": etag(job)}
        return Answer(202, headers, self.listed(job).model_dump_json())


def add_to(router: APIRouter, kind: Kind[Any]) -> None:
    _add_reading(router, kind)
    _add_verbs(router, kind)
    _add_history(router)


def _add_reading(router: APIRouter, kind: Kind[Any]) -> None:
    @router.get("", response_model=kind.page, openapi_extra=METADATA_PARAMETER)
    def find(
        request: Request,
        ledger: TheLedger,
        caller: TheCaller,
        metadata: MetadataWanted,
        after: After = None,
        limit: Limit = 20,
        state: State | None = None,
        outcome: Outcome | None = None,
        damage: Damage | None = None,
    ) -> Any:
        """`damage` is compared with the request's; of `metadata[key]=value` every pair must be there."""
        wanted = Wanted(state, outcome, damage, metadata)
        found = ledger.list(unseal(request, after, repr(wanted)), limit, wanted, caller.tenant, kind.name)
        cursor = seal(request, found.next_cursor, repr(wanted))
        data = [kind.listed(job) for job in found.data]
        return Page(object="list", data=data, has_more=found.has_more, next_cursor=cursor)

    @router.get("/{id}", response_model=kind.model)
    async def read(
        id: str,  # noqa: ARG001 - documents the path
        request: Request,
        wait: Annotated[float, Query(ge=0, le=60)] = 0,
        if_none_match: Annotated[str, Header(max_length=1000)] = "",
    ) -> Response:
        """With `wait`, answers at the next change, or after so many seconds."""
        return await answer_with(kind, request, wait, if_none_match)


async def answer_with(kind: Kind[Any], request: Request, wait: float, if_none_match: str) -> Response:
    """The job that was asked for, at once or once it is newer."""
    state, known = request.app.state, known_etags(if_none_match)
    job: Recovery = request.state.job
    if wait:
        job = await state.watch.newer(job, known, wait)
    headers = {"ETag": etag(job)}
    if etag(job) in known:
        return Response(status_code=304, headers=headers)
    if kind.detailed is None:
        shown = kind.listed(job)
    else:
        shown = await in_thread(kind.detailed, job, state.ledger, state.settings)
    return Response(shown.model_dump_json(), headers=headers, media_type="application/json")


def _add_verbs(router: APIRouter, kind: Kind[Any]) -> None:
    @router.patch("/{id}", response_model=kind.model, openapi_extra=documented(ChangeRecovery, CHANGE))
    def change(
        id: str,
        body: ChangeBody,
        ledger: TheLedger,
        settings: TheSettings,
        response: Response,
        if_match: IfMatch = None,
    ) -> Any:
        """Another priority, other metadata."""
        job = ledger.change(id, body, version_of(if_match))
        response.headers["ETag"] = etag(job)
        return kind.shown(job, ledger, settings)

    @router.post("/{id}/cancel", response_model=kind.model)
    def cancel(id: str, ledger: TheLedger, settings: TheSettings, if_match: IfMatch = None) -> Any:
        return kind.shown(ledger.cancel(id, version_of(if_match)), ledger, settings)

    @router.post("/{id}/pause", response_model=kind.model)
    def pause(id: str, ledger: TheLedger, settings: TheSettings, if_match: IfMatch = None) -> Any:
        return kind.shown(ledger.pause(id, version_of(if_match)), ledger, settings)

    @router.post("/{id}/resume", response_model=kind.model)
    def resume(id: str, ledger: TheLedger, settings: TheSettings, if_match: IfMatch = None) -> Any:
        return kind.shown(ledger.resume(id, version_of(if_match)), ledger, settings)

    @router.post("/{id}/retry", response_model=kind.model, status_code=202)
    def retry(
        id: str, request: Request, ledger: TheLedger, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """A new job that repeats one which failed or was cancelled."""

        def make(keep: Keep) -> Answer:
            return kind.accepted(ledger.retry(id, lambda conn, job: keep(conn, lambda: kind.accepted(job))))

        return answer_once(request, idempotency_key, str, make)


def _add_history(router: APIRouter) -> None:
    @router.get("/{id}/events", response_model=Page[Event])
    async def events(
        id: str,
        ledger: TheLedger,
        watch: TheWatch,
        after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        accept: ByAccept = "",
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Page[Event] | Response:
        """A page; or for `Accept: text/event-stream` all there are and will be, to the end of the job."""
        if "text/event-stream" not in accept:
            return await run_in_threadpool(ledger.events, id, after, limit)
        since = after if last_event_id is None else _event_number(last_event_id)
        return StreamingResponse(watch.stream(id, since), headers=STREAM, media_type="text/event-stream")

    @router.get("/{id}/alignment", response_model=Alignment)
    def alignment(id: str, ledger: TheLedger, settings: TheSettings, accept: ByAccept = "") -> Download:
        """JSON; or for `Accept: text/csv`, `image/svg+xml` or `image/png` the layers as table or picture."""
        suffix = next((suffix for kind, suffix in PICTURES.items() if kind in accept), "json")
        opened = open_artifact(published(id, ledger, settings), f"alignment.{suffix}")
        return Download(opened, headers=NOT_OUR_PAGE | {"Vary": "Accept"})


def published(id: str, ledger: Ledger, settings: Settings) -> Published:
    """A job's artifacts, once nobody publishes any more."""
    state = ledger.get(id).state
    if state not in TERMINAL_STATES:
        raise Conflict("not_finished", f"the {kind_of(id)} is {state}; its files are there once it has ended")
    place = ledger.committed(id).get("package")
    if place is None:
        raise NotFound("no_artifacts", f"this {kind_of(id)} published no artifacts")
    return open_published(open_store(settings), place)


def version_of(if_match: str | None) -> int | None:
    """The version that a job must still have; None: any."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'\s*"([0-9]{1,9})"\s*', if_match)
    if found is None:  # a weak ETag, or one of another kind, never matches (RFC 9110, 13.1.1)
        raise PreconditionFailed("precondition_failed", "If-Match is no ETag of this job; read it again")
    return int(found.group(1))


def _event_number(last_event_id: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
        raise BadRequest("invalid_event_id", "Last-Event-ID must be the id of an event of this stream")
    return min(int(last_event_id), 2**31 - 1)
