"""A claim's lease as its supervisor sees it: renewed in time, and with it what is heard of the job.

A database that is away for a moment costs nothing: the claim is ours until the lease that was
last renewed runs out, by this machine's clock counted from before the renewal was sent.
"""

import logging
import time

from recoup_jobs.claims import Claim
from recoup_jobs.database import AWAY
from recoup_jobs.ledger import Held, Ledger

MOST_RENEW_SECONDS = 2.0
"""A wish of the job's clients is heard within this time."""

log = logging.getLogger(__name__)


class Lease:
    """Holds one claim for as long as `look` is called often enough."""

    def __init__(self, ledger: Ledger, claim: Claim, seconds: float) -> None:
        self._ledger, self._claim, self._seconds = ledger, claim, seconds
        self._heard: Held = "held"
        self._until = time.monotonic() + seconds
        self._renew_at = 0.0
        self._pulse, self._beat_at = -1, time.monotonic()
        self.was_away = False
        """Whether the database could not be reached at some time since the claim."""

    def look(self) -> Held:
        """What is asked of the job; `lost` once the lease is, or may be, somebody else's."""
        sent = time.monotonic()
        if sent >= self._renew_at:
            self._renew_at = sent + min(self._seconds / 3, MOST_RENEW_SECONDS)
            try:
                self._renew(sent)
            except AWAY as outage:
                self.was_away = True
                log.warning("%s: the lease could not be renewed: %s", self._claim.job_id, outage)
        return "lost" if time.monotonic() >= self._until else self._heard

    @property
    def quiet_seconds(self) -> float:
        """How long ago the runner last wrote anything into the ledger."""
        return time.monotonic() - self._beat_at

    def _renew(self, sent: float) -> None:
        self._heard = self._ledger.renew(self._claim, self._seconds)
        self._until = sent + self._seconds
        pulse = self._ledger.pulse(self._claim.job_id)
        if pulse != self._pulse:
            self._pulse, self._beat_at = pulse, sent
