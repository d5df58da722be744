"""`/v1/diagnoses`: how a student is damaged, without training. The job is the first stage of a recovery."""

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from recoup.schemas import CreateDiagnosis, Diagnosis, DiagnosisReport, Page, Recovery
from recoup_api.body import DiagnosisBody, documented
from recoup_api.examples import DIAGNOSIS_REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.jobs import Kind, add_to, published
from recoup_api.wiring import (
    TheCaller,
    TheInspections,
    TheLedger,
    TheSettings,
    for_jobs,
)
from recoup_jobs.answers import Answer
from recoup_jobs.artifacts import open_artifact
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import preflight
from recoup_jobs.quotas import require_room_for_job
from recoup_jobs.settings import Settings

PATH = "/v1/diagnoses"
router = APIRouter(
    prefix=PATH,
    tags=["diagnoses"],
    dependencies=[Depends(for_jobs("diagnosis"))],
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

    def make(keep: Keep) -> Answer:
        def also(conn: Connection, job: Recovery) -> None:
            require_room_for_job(conn, caller.tenant, settings.max_live_jobs)
            keep(conn, lambda: DIAGNOSIS.accepted(job))

        preflight(asked, ledger, settings, caller.tenant, inspections)
        return DIAGNOSIS.accepted(ledger.create(asked, settings.queue, caller.tenant, also, "diagnosis"))

    return answer_once(request, idempotency_key, body.model_dump_json, make)


def _detailed(job: Recovery, ledger: Ledger, settings: Settings) -> Diagnosis:
    if job.state != "succeeded":
        return _listed(job)
    opened = open_artifact(published(job.id, ledger, settings), "report.json")
    report = DiagnosisReport.model_validate_json(opened.read_bytes())
    return _listed(job).model_copy(update={"report": report})


def _listed(job: Recovery) -> Diagnosis:
    """Without its report."""
    fields = {name: getattr(job, name) for name in Diagnosis.model_fields if hasattr(job, name)}
    return Diagnosis.model_validate(
        fields | {"object": "diagnosis", "request": CreateDiagnosis.of(job.request), "report": None}
    )


DIAGNOSIS = Kind("diagnosis", PATH, Diagnosis, Page[Diagnosis], _listed, _detailed)
add_to(router, DIAGNOSIS)
