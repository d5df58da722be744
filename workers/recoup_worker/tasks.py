"""What a hint sets off: claim the best job there is, supervise it, say how it ended."""

import logging
import threading

import structlog

from recoup_jobs import tracing
from recoup_jobs.claims import Claim
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
    if not take_one(ledger, settings, owner, stopping):
        log.info("hint for %s: nothing to claim", job_id)


def take_one(ledger: Ledger, settings: Settings, owner: str, stopping: threading.Event) -> bool:
    """Claims and runs the best free job of this worker's class; whether there was one."""
    claim = ledger.claim(owner, [settings.queue], settings.lease_seconds)
    if claim is not None:
        _supervise(claim, ledger, settings, stopping)
    return claim is not None


def _supervise(claim: Claim, ledger: Ledger, settings: Settings, stopping: threading.Event) -> None:
    ids = {"job_id": claim.job_id, "epoch": claim.epoch}
    with structlog.contextvars.bound_contextvars(**ids), tracing.span("work", claim.traceparent, **ids):
        log.info("claimed %s at epoch %d", claim.job_id, claim.epoch)
        supervise(claim, ledger, settings, stopping)
