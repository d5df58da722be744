"""Whose things are: another tenant's recovery or file is as unknown as one that never was."""

from collections.abc import Iterator

from sqlalchemy import bindparam, select

from recoup.schemas import CreateRecovery, FilePrompts
from recoup_jobs import catalog
from recoup_jobs.errors import NotFound
from recoup_jobs.findings import Findings
from recoup_jobs.kinds import JOB_ID, kind_of
from recoup_jobs.ledger import Ledger
from recoup_jobs.tables import jobs

_OWN = select(jobs.c.id).where(jobs.c.id == bindparam("id"), jobs.c.tenant == bindparam("tenant"))


def require_own_job(ledger: Ledger, id: str, tenant: str) -> None:
    with ledger.reading() as conn:
        if not JOB_ID.fullmatch(id) or conn.execute(_OWN, {"id": id, "tenant": tenant}).first() is None:
            kind = kind_of(id)
            raise NotFound(f"{kind}_not_found", f"there is no {kind} of this id")


def require_own_files(ledger: Ledger, request: CreateRecovery, tenant: str) -> None:
    """Raises `Unprocessable` naming each file that this tenant does not have."""
    findings = Findings()
    for pointer, id in _files(request):
        with findings.at(pointer):
            catalog.get(ledger, id, tenant)
    findings.raise_if_any()


def _files(request: CreateRecovery) -> Iterator[tuple[str, str]]:
    if isinstance(request.prompts, FilePrompts):
        yield "/prompts/file", request.prompts.file
    if request.keep is not None:
        yield "/keep/file", request.keep.file
    if request.evaluation.natural_text is not None:
        yield "/evaluation/natural_text/file", request.evaluation.natural_text.file
    for index, task in enumerate(request.evaluation.tasks):
        yield f"/evaluation/tasks/{index}/file", task.file
