"""What a recovery was expected to take, and what its machine learns from how long it took."""

import logging
from pathlib import Path

from recoup.schemas import CostEstimate
from recoup_jobs import calibration
from recoup_jobs.calibration import Measured
from recoup_jobs.claims import Claim
from recoup_jobs.database import AWAY
from recoup_jobs.errors import RecoupError, Unprocessable
from recoup_jobs.forecast import cost_of, forecast
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import Look, look
from recoup_jobs.settings import Settings
from recoup_ml.errors import RecoveryError
from recoup_ml.plan import make_plan
from recoup_worker.journal import LedgerJournal

EXPECTED = "expected.json"

log = logging.getLogger(__name__)


def expect(claim: Claim, seen: Look, ledger: Ledger, settings: Settings, folder: Path) -> None:
    """Leaves the estimate in the preflight's folder, and in the log why vLLM could not serve what will be.

    Neither is there if the request cannot be planned before it is measured.
    """
    request = claim.request
    assert seen.student and seen.teacher, "preflight refused nothing, so both can be read"
    try:
        found = forecast(request, seen.student, seen.teacher, ledger, settings, make_plan, RecoveryError)
    except Unprocessable:  # the diagnosis may know better
        return
    for warning in found.unservable:
        ledger.event(claim, "log", {"message": f"{warning.pointer}: {warning.message}"})
    (folder / EXPECTED).write_text(cost_of(found, ledger, settings.queue).model_dump_json())


def expected(folder: Path) -> CostEstimate | None:
    """What `expect` left there."""
    place = folder / EXPECTED
    return CostEstimate.model_validate_json(place.read_bytes()) if place.exists() else None


def learn(claim: Claim, ledger: Ledger, settings: Settings, journal: LedgerJournal) -> None:
    """Writes down how long each stage took, by the plan that was carried out.

    A job that was taken up a second time, or needed no recovery, teaches nothing: what its stages took is
    not what such work takes. Nor is what is learnt worth a job: what goes wrong here is logged.
    """
    generated = ledger.committed(claim.job_id).get("generate")
    if generated is None or claim.epoch > 1:
        return
    try:
        measured = _measured(claim, ledger, settings, journal, settings.stage_folder(generated))
        calibration.record(ledger, settings.queue, claim.job_id, measured)
    except (RecoupError, *AWAY) as error:
        log.warning("%s: how long it took was not written down: %s", claim.job_id, error)


def _measured(
    claim: Claim, ledger: Ledger, settings: Settings, journal: LedgerJournal, generated: Path
) -> list[Measured]:
    from recoup_ml import results
    from recoup_ml.plan import Plan

    place, seen = generated / "plan.json", look(claim.request, ledger, settings)
    if not (place.exists() and seen.student and seen.teacher):
        return []
    plan = results.read(place, Plan)
    found = forecast(
        claim.request, seen.student, seen.teacher, ledger, settings, lambda *_: plan, RecoveryError
    )
    return found.measured(journal.stage_seconds())
