"""`/v1/recoveries`: create, follow, steer, and fetch what came of it."""

import json
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy import Connection

from recoup.schemas import (
    Artifact,
    CreateRecovery,
    DryRun,
    Page,
    Recovery,
    Report,
)
from recoup_api.body import RecoveryBody, documented
from recoup_api.downloads import Download
from recoup_api.dry_run import foresee, require_servable
from recoup_api.examples import REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once, require_key
from recoup_api.jobs import NOT_OUR_PAGE, ByAccept, Kind, add_to, published
from recoup_api.threads import in_thread
from recoup_api.wiring import TheLedger, TheSettings, for_jobs
from recoup_jobs.answers import Answer
from recoup_jobs.artifacts import RECIPE, open_artifact
from recoup_jobs.errors import NotFound, RangeNotSatisfiable
from recoup_jobs.preflight import preflight
from recoup_jobs.quotas import require_room_for_job
from recoup_jobs.settings import Settings


async def _one_range(request: Request) -> None:
    if "," in request.headers.get("range", ""):
        raise RangeNotSatisfiable("range_not_satisfiable", "ask for one range of bytes at a time")


PATH = "/v1/recoveries"
router = APIRouter(
    prefix=PATH,
    tags=["recoveries"],
    dependencies=[Depends(for_jobs("recovery"))],
)


RECOVERY = Kind("recovery", PATH, Recovery, Page[Recovery], lambda job: job)


@router.post(
    "",
    status_code=202,
    response_model=Recovery,
    responses={200: {"model": DryRun, "description": "With `dry_run`: nothing was queued."}},
    openapi_extra=documented(CreateRecovery, REQUEST),
)
async def create(
    request: Request, body: RecoveryBody, dry_run: bool = False, idempotency_key: IdempotencyKey = None
) -> Response:
    """With `dry_run` nothing is queued: the answer is plan, findings, warnings and estimate."""
    return await in_thread(_foreseen if dry_run else _created, request, body, idempotency_key)


def _foreseen(request: Request, body: CreateRecovery, key: str | None) -> Response:
    require_key(key)
    state, tenant = request.app.state, request.state.caller.tenant
    found = foresee(body, state.ledger, state.settings, tenant, state.inspections)
    return Response(found.model_dump_json(), media_type="application/json")


def _created(request: Request, body: CreateRecovery, key: str | None) -> Response:
    state, tenant = request.app.state, request.state.caller.tenant
    settings: Settings = state.settings

    def make(keep: Keep) -> Answer:
        def also(conn: Connection, job: Recovery) -> None:
            require_room_for_job(conn, tenant, settings.max_live_jobs)
            keep(conn, lambda: RECOVERY.accepted(job))

        seen = preflight(body, state.ledger, settings, tenant, state.inspections)
        require_servable(body, seen, state.ledger, settings)
        return RECOVERY.accepted(state.ledger.create(body, settings.queue, tenant, also))

    return answer_once(request, key, body.model_dump_json, make)


add_to(router, RECOVERY)


@router.get("/{id}/report", response_model=Report)
def report(id: str, ledger: TheLedger, settings: TheSettings, accept: ByAccept = "") -> Download:
    """JSON, or one self-contained page for `Accept: text/html`."""
    name = "report.html" if "text/html" in accept else "report.json"
    headers = NOT_OUR_PAGE | {"Vary": "Accept"}
    return Download(open_artifact(published(id, ledger, settings), name), headers=headers)


@router.get("/{id}/recipe", response_class=FileResponse)
def recipe(id: str, ledger: TheLedger, settings: TheSettings) -> Download:
    """A Python script that repeats the training with transformers and peft alone."""
    found = published(id, ledger, settings)
    report = json.loads(open_artifact(found, "report.json").read_bytes())
    if report["training"] is None:
        raise NotFound("no_recipe", f"there is no training to repeat: {_why_untrained(report)}")
    return Download(open_artifact(found, RECIPE), media_type="text/x-python", headers=NOT_OUR_PAGE)


@router.get("/{id}/artifacts")
def artifacts(id: str, ledger: TheLedger, settings: TheSettings) -> Page[Artifact]:
    found = list(published(id, ledger, settings).artifacts)
    return Page(object="list", data=found, has_more=False, next_cursor=None)


@router.get("/{id}/artifacts/{path:path}", response_class=FileResponse, dependencies=[Depends(_one_range)])
def artifact(id: str, path: str, ledger: TheLedger, settings: TheSettings) -> Download:
    return Download(open_artifact(published(id, ledger, settings), path), headers=NOT_OUR_PAGE)


def _why_untrained(report: dict[str, Any]) -> str:
    if report["outcome"] == "not_needed":
        return "the student was as close to its teacher as rounding allows"
    method = next(choice["value"] for choice in report["plan"] if choice["name"] == "method")
    return f"the method of this recovery, {method}, changes weights without training"
