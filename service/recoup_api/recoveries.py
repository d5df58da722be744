"""`/v1/recoveries`: create, follow, steer, and fetch what came of it."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy import Connection

from recoup.schemas import (
    Alignment,
    Artifact,
    ChangeRecovery,
    CreateRecovery,
    DryRun,
    Event,
    Page,
    Recovery,
    Report,
    State,
)
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_api.body import ChangeBody, RecoveryBody, documented
from recoup_api.cursors import seal, unseal
from recoup_api.dry_run import foresee
from recoup_api.examples import CHANGE, REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.watch import etag, known_etags
from recoup_api.wiring import (
    After,
    Limit,
    TheCaller,
    TheInspections,
    TheLedger,
    TheSettings,
    TheWatch,
    needs,
    of_kind,
    own_job,
)
from recoup_jobs.answers import Answer
from recoup_jobs.artifacts import ARTIFACTS, RECIPE, open_artifact, read_manifest
from recoup_jobs.errors import BadRequest, Conflict, NotFound, RangeNotSatisfiable
from recoup_jobs.kinds import kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.quotas import require_room_for_job
from recoup_jobs.settings import Settings


async def _one_range(request: Request) -> None:
    if "," in request.headers.get("range", ""):
        raise RangeNotSatisfiable("range_not_satisfiable", "ask for one range of bytes at a time")


router = APIRouter(
    prefix="/v1/recoveries",
    tags=["recoveries"],
    dependencies=[Depends(needs("jobs")), Depends(of_kind("recovery")), Depends(own_job)],
)

# A report shows what models wrote; whatever a browser makes of it, it is not this server's own page.
NOT_OUR_PAGE = {"Content-Security-Policy": "sandbox allow-scripts", "X-Content-Type-Options": "nosniff"}

ByAccept = Annotated[str, Header()]
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

PICTURES = {"text/csv": "csv", "image/svg+xml": "svg", "image/png": "png"}
"""As what an alignment comes beside JSON."""


@router.post(
    "",
    status_code=202,
    response_model=Recovery,
    responses={200: {"model": DryRun, "description": "With `dry_run`: nothing was queued."}},
    openapi_extra=documented(CreateRecovery, REQUEST),
)
def create(
    request: Request,
    body: RecoveryBody,
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    inspections: TheInspections,
    dry_run: bool = False,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """With `dry_run` nothing is queued: the answer is plan, findings and estimate."""
    if dry_run:
        found = foresee(body, ledger, settings, caller.tenant, inspections)
        return Response(found.model_dump_json(), media_type="application/json")

    def make(keep: Keep) -> Answer:
        require_room_for_job(ledger, caller.tenant, settings.max_live_jobs)
        preflight(body, ledger, settings, caller.tenant, inspections)
        with_answer = partial(_keep_accepted, keep)
        return _accepted(ledger.create(body, settings.queue, caller.tenant, with_answer))

    return answer_once(request, idempotency_key, body.model_dump_json(), make)


@router.get("")
def find(
    request: Request,
    ledger: TheLedger,
    caller: TheCaller,
    after: After = None,
    limit: Limit = 20,
    state: State | None = None,
) -> Page[Recovery]:
    found = ledger.list(unseal(request, after, state or ""), limit, state, caller.tenant)
    return found.model_copy(update={"next_cursor": seal(request, found.next_cursor, state or "")})


@router.get("/{id}", response_model=Recovery)
async def read(
    id: str,
    watch: TheWatch,
    response: Response,
    wait: Annotated[float, Query(ge=0, le=60)] = 0,
    if_none_match: Annotated[str, Header(max_length=1000)] = "",
) -> Recovery | Response:
    """With `wait`, answers at the next change, or after so many seconds."""
    known = known_etags(if_none_match)
    recovery = await watch.newer(id, known, wait)
    response.headers["ETag"] = etag(recovery)
    return Response(status_code=304, headers=response.headers) if etag(recovery) in known else recovery


@router.patch("/{id}", openapi_extra=documented(ChangeRecovery, CHANGE))
def change(id: str, body: ChangeBody, ledger: TheLedger, response: Response) -> Recovery:
    """Another priority, other metadata."""
    recovery = ledger.change(id, body)
    response.headers["ETag"] = etag(recovery)
    return recovery


@router.post("/{id}/cancel")
def cancel(id: str, ledger: TheLedger) -> Recovery:
    return ledger.cancel(id)


@router.post("/{id}/pause")
def pause(id: str, ledger: TheLedger) -> Recovery:
    return ledger.pause(id)


@router.post("/{id}/resume")
def resume(id: str, ledger: TheLedger) -> Recovery:
    return ledger.resume(id)


@router.post("/{id}/retry", status_code=202)
def retry(id: str, ledger: TheLedger, response: Response) -> Recovery:
    """A new recovery that repeats one which failed or was cancelled."""
    recovery = ledger.retry(id)
    response.headers.update({"Location": f"/v1/recoveries/{recovery.id}", "ETag": etag(recovery)})
    return recovery


@router.get("/{id}/events", response_model=Page[Event])
async def events(
    id: str,
    ledger: TheLedger,
    watch: TheWatch,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Page[Event] | Response:
    """A page; or for `Accept: text/event-stream` all there are and will be, to the end of the job."""
    if "text/event-stream" not in accept:
        return await run_in_threadpool(ledger.events, id, after, limit)
    since = after if last_event_id is None else _event_number(last_event_id)
    return StreamingResponse(watch.stream(id, since), headers=STREAM, media_type="text/event-stream")


@router.get("/{id}/report", response_model=Report)
def report(
    id: str, ledger: TheLedger, settings: TheSettings, accept: Annotated[str, Header()] = ""
) -> FileResponse:
    """JSON, or one self-contained page for `Accept: text/html`."""
    name = "report.html" if "text/html" in accept else "report.json"
    headers = NOT_OUR_PAGE | {"Vary": "Accept"}
    return FileResponse(open_artifact(published(id, ledger, settings), name), headers=headers)


@router.get("/{id}/alignment", response_model=Alignment)
def alignment(id: str, ledger: TheLedger, settings: TheSettings, accept: ByAccept = "") -> FileResponse:
    """JSON; or for `Accept: text/csv`, `image/svg+xml` or `image/png` the layers as a table or a picture."""
    return alignment_file(id, ledger, settings, accept)


@router.get("/{id}/recipe", response_class=FileResponse)
def recipe(id: str, ledger: TheLedger, settings: TheSettings) -> FileResponse:
    """A Python script that repeats the training with transformers and peft alone."""
    folder = published(id, ledger, settings)
    report = json.loads(open_artifact(folder, "report.json").read_bytes())
    if report["training"] is None:
        raise NotFound("no_recipe", f"there is no training to repeat: {_why_untrained(report)}")
    return FileResponse(open_artifact(folder, RECIPE), media_type="text/x-python", headers=NOT_OUR_PAGE)


@router.get("/{id}/artifacts")
def artifacts(id: str, ledger: TheLedger, settings: TheSettings) -> Page[Artifact]:
    found = read_manifest(published(id, ledger, settings))
    return Page(object="list", data=found, has_more=False, next_cursor=None)


@router.get("/{id}/artifacts/{path:path}", response_class=FileResponse, dependencies=[Depends(_one_range)])
def artifact(id: str, path: str, ledger: TheLedger, settings: TheSettings) -> FileResponse:
    return FileResponse(open_artifact(published(id, ledger, settings), path), headers=NOT_OUR_PAGE)


def alignment_file(id: str, ledger: Ledger, settings: Settings, accept: str) -> FileResponse:
    suffix = next((suffix for kind, suffix in PICTURES.items() if kind in accept), "json")
    path = open_artifact(published(id, ledger, settings), f"alignment.{suffix}")
    return FileResponse(path, headers=NOT_OUR_PAGE | {"Vary": "Accept"})


def _accepted(recovery: Recovery) -> Answer:
    headers = {"Location": f"/v1/recoveries/{recovery.id}", "ETag": etag(recovery)}
    return Answer(202, headers, recovery.model_dump_json())


def _keep_accepted(keep: Keep, conn: Connection, recovery: Recovery) -> None:
    keep(conn, _accepted(recovery))


def _event_number(last_event_id: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
        raise BadRequest("invalid_event_id", "Last-Event-ID must be the id of an event of this stream")
    return min(int(last_event_id), 2**31 - 1)


def _why_untrained(report: dict[str, Any]) -> str:
    if report["outcome"] == "not_needed":
        return "the student was as close to its teacher as rounding allows"
    method = next(choice["value"] for choice in report["plan"] if choice["name"] == "method")
    return f"the method of this recovery, {method}, changes weights without training"


def published(id: str, ledger: Ledger, settings: Settings) -> Path:
    """The folder of a job's artifacts, once nobody writes there any more."""
    state = ledger.get(id).state
    if state not in TERMINAL_STATES:
        raise Conflict("not_finished", f"the {kind_of(id)} is {state}; its files are there once it has ended")
    folder = ledger.committed(id).get("package")
    if folder is None:
        raise NotFound("no_artifacts", f"this {kind_of(id)} published no artifacts")
    return settings.stage_folder(folder) / ARTIFACTS
