"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning API, over the same ledger as `/v1/recoveries`."""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy import Connection

from recoup.schemas import Event, Page, Recovery
from recoup_api.body import body_of, documented
from recoup_api.examples import JOB_REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.query import METADATA_PARAMETER, MetadataWanted
from recoup_api.wiring import (
    Limit,
    TheCaller,
    TheInspections,
    TheLedger,
    TheSettings,
    for_jobs,
)
from recoup_jobs import catalog
from recoup_jobs.answers import Answer
from recoup_jobs.errors import BadRequest, NotFound, Unprocessable
from recoup_jobs.filters import Wanted
from recoup_jobs.findings import Findings
from recoup_jobs.keys import Caller
from recoup_jobs.ledger import Ledger
from recoup_jobs.looking import latest_events
from recoup_jobs.openai_jobs import (
    CreateJob,
    as_checkpoint,
    as_job,
    as_job_event,
    as_recovery,
    in_words_of_job,
)
from recoup_jobs.preflight import preflight
from recoup_jobs.quotas import require_room_for_job
from recoup_jobs.tables import events

router = APIRouter(
    prefix="/v1/fine_tuning/jobs",
    tags=["fine-tuning"],
    dependencies=[Depends(for_jobs("recovery"))],
)

JobBody = Annotated[CreateJob, Depends(body_of(CreateJob))]
AfterJob = Annotated[str | None, Query(max_length=64)]
"""The id of the last item of the page before."""


@router.post("", openapi_extra=documented(CreateJob, JOB_REQUEST))
def create(
    request: Request,
    body: JobBody,
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    inspections: TheInspections,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    def make(keep: Keep) -> Answer:
        def also(conn: Connection, new: Recovery) -> None:
            require_room_for_job(conn, caller.tenant, settings.max_live_jobs)
            keep(conn, lambda: answer(new))

        recovery = as_recovery(body, settings.aliases, _rows(ledger, caller, body))
        try:
            preflight(recovery, ledger, settings, caller.tenant, inspections)
        except Unprocessable as refusal:
            raise in_words_of_job(refusal.items) from None
        return answer(ledger.create(recovery, settings.queue, caller.tenant, also))

    def answer(recovery: Recovery) -> Answer:
        return Answer(200, {}, json.dumps(as_job(recovery, settings.aliases, caller.tenant)))

    return answer_once(request, idempotency_key, body.model_dump_json, make)


@router.get("", openapi_extra=METADATA_PARAMETER)
def find(
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    metadata: MetadataWanted,
    after: AfterJob = None,
    limit: Limit = 20,
) -> Page[dict[str, Any]]:
    if after is not None:
        _require_own_cursor(ledger, after, caller)
    found = ledger.list(after, limit, Wanted(metadata=metadata), caller.tenant)
    jobs = [as_job(recovery, settings.aliases, caller.tenant) for recovery in found.data]
    return Page(object="list", data=jobs, has_more=found.has_more, next_cursor=found.next_cursor)


@router.get("/{id}")
def read(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> dict[str, Any]:
    return as_job(ledger.get(id), settings.aliases, caller.tenant)


@router.post("/{id}/cancel")
def cancel(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> dict[str, Any]:
    return as_job(ledger.cancel(id), settings.aliases, caller.tenant)


@router.post("/{id}/pause")
def pause(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> dict[str, Any]:
    return as_job(ledger.pause(id), settings.aliases, caller.tenant)


@router.post("/{id}/resume")
def resume(id: str, ledger: TheLedger, settings: TheSettings, caller: TheCaller) -> dict[str, Any]:
    return as_job(ledger.resume(id), settings.aliases, caller.tenant)


@router.get("/{id}/events")
def list_events(
    id: str, ledger: TheLedger, after: AfterJob = None, limit: Limit = 20
) -> Page[dict[str, Any]]:
    """Newest first."""
    found = latest_events(ledger, id, _before(after, "ftevent"), limit + 1)
    return _page(found, limit, as_job_event)


@router.get("/{id}/checkpoints")
def list_checkpoints(
    id: str, ledger: TheLedger, after: AfterJob = None, limit: Limit = 10
) -> Page[dict[str, Any]]:
    """Newest first: the steps at which the student was validated."""
    validated = events.c.data["name"].as_string() == "validation"
    found = latest_events(ledger, id, _before(after, "ftckpt"), limit + 1, validated)
    return _page(found, limit, lambda event: as_checkpoint(id, event))


def _require_own_cursor(ledger: Ledger, after: str, caller: Caller) -> None:
    try:
        ledger.get(after, caller.tenant)
    except NotFound:
        raise BadRequest("invalid_cursor", "`after` must be the id of a job of an earlier page") from None


def _rows(ledger: Ledger, caller: Caller, job: CreateJob) -> int:
    """Of the training file; raises `Unprocessable` for files that the caller does not have."""
    findings = Findings()
    with findings.at("/training_file"):
        rows = catalog.get(ledger, job.training_file, caller.tenant).rows
    if job.validation_file is not None:
        with findings.at("/validation_file"):
            catalog.get(ledger, job.validation_file, caller.tenant)
    findings.raise_if_any()
    return rows


def _before(after: str | None, kind: str) -> int:
    if after is None:
        return 2**31 - 1
    if not (shape := re.fullmatch(rf"{kind}-([0-9]{{1,9}})", after)):
        raise BadRequest("invalid_cursor", "`after` must be the id of an item of an earlier page")
    return int(shape.group(1))


def _page(found: list[Event], limit: int, shown: Callable[[Event], dict[str, Any]]) -> Page[dict[str, Any]]:
    data = [shown(event) for event in found[:limit]]
    has_more = len(found) > limit
    return Page(object="list", data=data, has_more=has_more, next_cursor=data[-1]["id"] if has_more else None)
