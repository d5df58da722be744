"""What a hint sets off: claim the best job there is, supervise it, say how it ended."""

import logging
import threading

from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_worker.supervisor import supervise

log = logging.getLogger(__name__)


def follow_hint(
    job_id: str, ledger: Ledger, settings: Settings, owner: str, stopping: threading.Event
) -> None:
    """Claims the best free job of this worker's class, whichever the hint named, and runs it.

    A hint that comes twice, late or for a job that is done finds nothing to claim.
    """
    claim = ledger.claim(owner, [settings.queue], settings.lease_seconds)
    if claim is None:
        log.info("hint for %s: nothing to claim", job_id)
        return
    log.info("claimed %s at epoch %d", claim.job_id, claim.epoch)
    supervise(claim, ledger, settings, stopping)
