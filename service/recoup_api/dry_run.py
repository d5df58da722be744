"""`POST /v1/recoveries?dry_run=true`: what a request would do, cost or be refused for; nothing is written.

A request whose result must be servable is planned the same way when it is made.
"""

from recoup.schemas import CreateRecovery, DryRun, ProblemItem
from recoup_jobs.errors import Unprocessable
from recoup_jobs.findings import refuse
from recoup_jobs.forecast import Forecast, cost_of, forecast
from recoup_jobs.inspection import Inspections
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import Look, look
from recoup_jobs.settings import Settings
from recoup_ml.errors import RecoveryError
from recoup_ml.plan import make_plan


def foresee(
    request: CreateRecovery, ledger: Ledger, settings: Settings, tenant: str, inspections: Inspections
) -> DryRun:
    """Plan and estimate are there as far as the models and the data can be read."""
    seen = look(request, ledger, settings, tenant, inspections)
    found = _forecast(request, seen, ledger, settings)
    planned = found if isinstance(found, Forecast) else None
    unservable = planned.unservable if planned else []
    refused = unservable if request.output.servable else []
    return DryRun(
        object="recovery.dry_run",
        plan=planned.choices if planned else [],
        findings=[*seen.findings, *([found] if isinstance(found, ProblemItem) else refused)],
        warnings=[] if request.output.servable else unservable,
        estimate=cost_of(planned, ledger, settings.queue) if planned else None,
    )


def require_servable(request: CreateRecovery, seen: Look, ledger: Ledger, settings: Settings) -> None:
    """Raises `Unprocessable` where a request insists on what vLLM could not serve."""
    if request.output.servable:
        found = _forecast(request, seen, ledger, settings)
        refuse(found.unservable if isinstance(found, Forecast) else [])


def _forecast(
    request: CreateRecovery, seen: Look, ledger: Ledger, settings: Settings
) -> Forecast | ProblemItem | None:
    """What would be, or why it cannot be; None where findings say so already."""
    readable = not any(item.pointer.endswith(("/file", "/held_out")) for item in seen.findings)
    if not (seen.student and seen.teacher and readable):
        return None
    try:
        return forecast(request, seen.student, seen.teacher, ledger, settings, make_plan, RecoveryError)
    except Unprocessable as refusal:
        return ProblemItem(pointer="/method/type", code=refusal.code, message=refusal.message)
