"""`/v1/recoveries`: create, follow, steer, and fetch what came of it."""

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import FileResponse

from recoup.schemas import (
    Alignment,
    Artifact,
    ChangeRecovery,
    CreateRecovery,
    Event,
    Page,
    Recovery,
    Report,
    State,
)
from recoup.schemas.recovery import TERMINAL_STATES
from recoup_api.body import ChangeBody, RecoveryBody, documented
from recoup_api.watch import etag, known_etags, newer
from recoup_api.wiring import After, Limit, TheLedger, TheSettings, of_kind
from recoup_jobs.artifacts import ARTIFACTS, RECIPE, open_artifact, read_manifest
from recoup_jobs.errors import Conflict, NotFound
from recoup_jobs.kinds import kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.settings import Settings

router = APIRouter(prefix="/v1/recoveries", tags=["recoveries"], dependencies=[Depends(of_kind("recovery"))])

# A report shows what models wrote; whatever a browser makes of it, it is not this server's own page.
NOT_OUR_PAGE = {"Content-Security-Policy": "sandbox allow-scripts", "X-Content-Type-Options": "nosniff"}

ByAccept = Annotated[str, Header()]

PICTURES = {"text/csv": "csv", "image/svg+xml": "svg", "image/png": "png"}
"""As what an alignment comes beside JSON."""


@router.post("", status_code=202, openapi_extra=documented(CreateRecovery, "/v1/recoveries"))
def create(body: RecoveryBody, ledger: TheLedger, settings: TheSettings, response: Response) -> Recovery:
    preflight(body, ledger, settings)
    recovery = ledger.create(body, settings.queue)
    response.headers.update({"Location": f"/v1/recoveries/{recovery.id}", "ETag": etag(recovery)})
    return recovery


@router.get("")
def find(
    ledger: TheLedger, after: After = None, limit: Limit = 20, state: State | None = None
) -> Page[Recovery]:
    return ledger.list(after, limit, state)


@router.get("/{id}", response_model=Recovery)
async def read(
    id: str,
    ledger: TheLedger,
    response: Response,
    wait: Annotated[float, Query(ge=0, le=60)] = 0,
    if_none_match: Annotated[str, Header(max_length=1000)] = "",
) -> Recovery | Response:
    """With `wait`, answers at the next change, or after so many seconds."""
    known = known_etags(if_none_match)
    recovery = await newer(ledger, id, known, wait)
    response.headers["ETag"] = etag(recovery)
    return Response(status_code=304, headers=response.headers) if etag(recovery) in known else recovery


@router.patch("/{id}", openapi_extra=documented(ChangeRecovery, "/v1/recoveries/{id}"))
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


@router.get("/{id}/events")
def events(
    id: str,
    ledger: TheLedger,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[Event]:
    return ledger.events(id, after, limit)


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


@router.get("/{id}/artifacts/{path:path}", response_class=FileResponse)
def artifact(id: str, path: str, ledger: TheLedger, settings: TheSettings) -> FileResponse:
    return FileResponse(open_artifact(published(id, ledger, settings), path), headers=NOT_OUR_PAGE)


def alignment_file(id: str, ledger: Ledger, settings: Settings, accept: str) -> FileResponse:
    suffix = next((suffix for kind, suffix in PICTURES.items() if kind in accept), "json")
    path = open_artifact(published(id, ledger, settings), f"alignment.{suffix}")
    return FileResponse(path, headers=NOT_OUR_PAGE | {"Vary": "Accept"})


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
