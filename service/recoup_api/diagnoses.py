"""`/v1/diagnoses`: how a student is damaged, without training. The job is the first stage of a recovery."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy import Connection

from recoup.schemas import Alignment, CreateDiagnosis, Diagnosis, DiagnosisReport, Event, Page, Recovery
from recoup_api.body import DiagnosisBody, documented
from recoup_api.examples import DIAGNOSIS_REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.recoveries import ByAccept, alignment_file, published
from recoup_api.watch import etag, known_etags
from recoup_api.wiring import (
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
from recoup_jobs.artifacts import open_artifact
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.quotas import require_room_for_job
from recoup_jobs.settings import Settings

router = APIRouter(
    prefix="/v1/diagnoses",
    tags=["diagnoses"],
    dependencies=[Depends(needs("jobs")), Depends(of_kind("diagnosis")), Depends(own_job)],
)


@router.post(
    "",
    status_code=202,
    response_model=Diagnosis,
    openapi_extra=documented(CreateDiagnosis, DIAGNOSIS_REQUEST),
)
def create(
    request: Request,
    body: DiagnosisBody,
    ledger: TheLedger,
    settings: TheSettings,
    caller: TheCaller,
    inspections: TheInspections,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    asked = body.as_recovery()

    def accepted(job: Recovery) -> Answer:
        headers = {"Location": f"/v1/diagnoses/{job.id}", "ETag": etag(job)}
        return Answer(202, headers, _diagnosis(job, ledger, settings).model_dump_json())

    def make(keep: Keep) -> Answer:
        def keep_accepted(conn: Connection, job: Recovery) -> None:
            keep(conn, accepted(job))

        require_room_for_job(ledger, caller.tenant, settings.max_live_jobs)
        preflight(asked, ledger, settings, caller.tenant, inspections)
        return accepted(ledger.create(asked, settings.queue, caller.tenant, keep_accepted, "diagnosis"))

    return answer_once(request, idempotency_key, body.model_dump_json(), make)


@router.get("/{id}", response_model=Diagnosis)
async def read(
    id: str,
    watch: TheWatch,
    ledger: TheLedger,
    settings: TheSettings,
    response: Response,
    wait: Annotated[float, Query(ge=0, le=60)] = 0,
    if_none_match: Annotated[str, Header(max_length=1000)] = "",
) -> Diagnosis | Response:
    """With `wait`, answers at the next change, or after so many seconds; with a report once it succeeded."""
    known = known_etags(if_none_match)
    job = await watch.newer(id, known, wait)
    response.headers["ETag"] = etag(job)
    if etag(job) in known:
        return Response(status_code=304, headers=response.headers)
    return _diagnosis(job, ledger, settings)


@router.post("/{id}/cancel")
def cancel(id: str, ledger: TheLedger, settings: TheSettings) -> Diagnosis:
    return _diagnosis(ledger.cancel(id), ledger, settings)


@router.get("/{id}/events")
def events(
    id: str,
    ledger: TheLedger,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[Event]:
    return ledger.events(id, after, limit)


@router.get("/{id}/alignment", response_model=Alignment)
def alignment(id: str, ledger: TheLedger, settings: TheSettings, accept: ByAccept = "") -> FileResponse:
    """JSON; or for `Accept: text/csv`, `image/svg+xml` or `image/png` the layers as a table or a picture."""
    return alignment_file(id, ledger, settings, accept)


def _diagnosis(job: Recovery, ledger: Ledger, settings: Settings) -> Diagnosis:
    fields = {name: getattr(job, name) for name in Diagnosis.model_fields if hasattr(job, name)}
    report = _report(job.id, ledger, settings) if job.state == "succeeded" else None
    return Diagnosis.model_validate(
        fields | {"object": "diagnosis", "request": CreateDiagnosis.of(job.request), "report": report}
    )


def _report(id: str, ledger: Ledger, settings: Settings) -> DiagnosisReport:
    path = open_artifact(published(id, ledger, settings), "report.json")
    return DiagnosisReport.model_validate_json(path.read_bytes())
